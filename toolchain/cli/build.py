"""toolchain build"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import ENGINE, PATH, dry_run_option, force_option, json_option
from toolchain.cli.output import Terminal, emit, facts
from toolchain.cli.placement import llm_api_options


@click.command(name="build")
@click.argument("directory", metavar="DIR", type=ENGINE)
@click.option(
    "--target", default="local", show_default=True, help="What runs the engine: local, trtllm or tensorrt."
)
@click.option("--gpu", default="cpu", show_default=True, help="GPU that it will run on.")
@click.option("--output", type=PATH, required=True, help="Engine directory.")
@click.option("--trtllm-version", help="TensorRT-LLM release. Default: the latest stable one.")
@click.option("--tp", type=int, help="Tensor parallel size. Default: as planned.")
@click.option("--ep", type=int, help="Expert parallel size. Default: as planned.")
@click.option("--pp", type=int, help="Pipeline parallel size. Default: as planned.")
@click.option("--max-batch-size", type=int, help="Requests at once. Default: as planned.")
@click.option("--max-seq-len", type=int, help="Tokens of prompt and answer. Default: as planned.")
@llm_api_options(planned=True)
@click.option(
    "--warmup",
    is_flag=True,
    help="Target trtllm: load, tune and try the engine where TensorRT-LLM is installed, else print the container "
    "command that does.",
)
@dry_run_option
@force_option
@json_option
def command(
    directory: Path,
    output: Path,
    warmup: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make an engine of DIR, a quantized checkpoint, for another target, GPU or limits than it was planned for."""
    from toolchain.pipeline.build import build_engine

    wishes = {key: value for key, value in options.items() if value is not None}
    manifest = build_engine(
        directory,
        output,
        wishes,
        command=["toolchain", *sys.argv[1:]],
        dry_run=dry_run,
        warmup=warmup,
        force=force,
        progress=Terminal(),
    )
    rows = [
        ("engine", output),
        ("target", f"{manifest['target']} {manifest['target_version']} on {manifest['gpu']}"),
        ("limits", manifest["limits"]),
        ("parallel", manifest["parallel"]),
        *_trtllm(output, manifest),
        ("next", f"toolchain triton {output}"),
    ]
    emit(manifest, as_json, facts(rows))


def _trtllm(output: Path, manifest: dict[str, Any]) -> list[tuple[str, Any]]:
    """What TensorRT-LLM does with the engine: its commands, and what a warm-up found."""
    if manifest["target"] != "trtllm" or manifest.get("dry_run"):
        return []
    rows: list[tuple[str, Any]] = [("serve, measure, evaluate", output / "commands.md")]
    warm = manifest.get("warmup")
    if warm is None:
        return rows
    if not warm["ran"]:
        where = shlex.quote(str(output))
        return [*rows, ("warm-up", f"TensorRT-LLM is not installed here: cd {where} && {warm['command']}")]
    seconds = warm["seconds"]
    rows.append(("warm-up", f"loaded and tuned in {seconds['load_and_tune']} s, {output / 'warmup.json'}"))
    return [*rows, *(("generated", f"{item['prompt']} ...{item['text']!r}") for item in warm["generated"])]
