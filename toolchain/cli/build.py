"""toolchain build"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import ENGINE, PATH, dry_run_option, force_option, json_option
from toolchain.cli.output import Terminal, emit, facts
from toolchain.cli.placement import llm_api_options


@click.command(name="build")
@click.argument("directory", metavar="DIR", type=ENGINE)
@click.option("--target", default="local", show_default=True, help="What runs the engine: local, trtllm or tensorrt.")
@click.option("--gpu", default="cpu", show_default=True, help="GPU that it will run on.")
@click.option("--output", type=PATH, required=True, help="Engine directory.")
@click.option("--trtllm-version", help="TensorRT-LLM release. Default: the latest stable one.")
@click.option("--tp", type=int, help="Tensor parallel size. Default: as planned.")
@click.option("--ep", type=int, help="Expert parallel size. Default: as planned.")
@click.option("--pp", type=int, help="Pipeline parallel size. Default: as planned.")
@click.option("--max-batch-size", type=int, help="Requests at once. Default: as planned.")
@click.option("--max-seq-len", type=int, help="Tokens of prompt and answer. Default: as planned.")
@llm_api_options(planned=True)
@dry_run_option
@force_option
@json_option
def command(directory: Path, output: Path, dry_run: bool, force: bool, as_json: bool, **options: Any) -> None:
    """Make an engine of DIR, a quantized checkpoint, for another target, GPU or limits than it was planned for."""
    from toolchain.pipeline.build import build_engine

    wishes = {key: value for key, value in options.items() if value is not None}
    manifest = build_engine(
        directory,
        output,
        wishes,
        command=["toolchain", *sys.argv[1:]],
        dry_run=dry_run,
        force=force,
        progress=Terminal(),
    )
    rows = [
        ("engine", output),
        ("target", f"{manifest['target']} {manifest['target_version']} on {manifest['gpu']}"),
        ("limits", manifest["limits"]),
        ("parallel", manifest["parallel"]),
        ("next", f"toolchain triton {output}"),
    ]
    emit(manifest, as_json, facts(rows))
