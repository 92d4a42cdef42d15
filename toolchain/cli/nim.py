"""toolchain nim"""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli.options import (
    ENGINE,
    PATH,
    allow_unfit_option,
    dry_run_option,
    force_option,
    json_option,
)
from toolchain.cli.output import Terminal, emit, facts
from toolchain.core.findings import errors


@click.command(name="nim")
@click.argument("engine", type=ENGINE)
@click.option("--output", type=PATH, help="Directory. Default: nim/<engine>.")
@click.option(
    "--nim",
    "major",
    type=click.Choice(["1", "2"]),
    default="2",
    show_default=True,
    help="1.x runs TensorRT-LLM; 2.x runs vLLM or SGLang.",
)
@click.option(
    "--backend",
    type=click.Choice(["tensorrt_llm", "vllm", "sglang"]),
    help="Default: vllm for 2.x, tensorrt_llm for 1.x.",
)
@allow_unfit_option
@dry_run_option
@force_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    engine: Path,
    output: Path | None,
    major: str,
    backend: str | None,
    allow_unfit: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write the directory that NVIDIA NIM loads ENGINE from: model/, nim.env, run.sh, and say what is missing.

    --dry-run checks only; its exit status is 1 when NIM would not load the engine.
    """
    from toolchain.deploy.nim import prepare_nim, write_nim

    nim = prepare_nim(engine, major=major, backend=backend or "", allow_unfit=allow_unfit)
    target = output or Path("nim") / nim.engine.name
    value = nim.to_json()
    if not dry_run:
        value = write_nim(nim, target, force=force)
    terminal = Terminal()
    for finding in nim.findings:
        terminal.note(str(finding))
    rows = [
        ("would write" if dry_run else "written", target),
        ("for", f"NIM {major}.x with {nim.backend}"),
        *nim.environment.items(),
        ("next", f"NIM_IMAGE=nvcr.io/nim/... {target}/run.sh"),
    ]
    emit({**value, "output": str(target), "dry_run": dry_run}, as_json, facts(rows))
    if dry_run and errors(nim.findings):
        ctx.exit(1)
