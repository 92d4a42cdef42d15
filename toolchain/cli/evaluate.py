"""toolchain evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toolchain.cli.evaluate_tasks import AskedTasks, render_tasks, task_options
from toolchain.cli.evaluate_text import render
from toolchain.cli.options import ENGINE, PATH, device_option, force_option, gate_options, json_option
from toolchain.cli.output import Terminal, emit
from toolchain.core.errors import UsageError


@click.command(name="evaluate")
@click.argument("directory", metavar="DIR", type=ENGINE)
@click.option("--baseline", metavar="MODEL", help="The model that it was made of: adds KL and agreement.")
@click.option(
    "--data",
    multiple=True,
    metavar="PATH|NAME",
    help="Text, JSONL or Parquet, a directory of them, or a data set on the hub; may be repeated. Default: "
    "evaluation.jsonl of the baseline, if it has one.",
)
@click.option("--max-tokens", type=int, default=16_384, show_default=True, help="Tokens to judge on.")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens of context.")
@click.option("--stride", type=int, help="Tokens from window to window. Default: --window, no overlap.")
@click.option(
    "--emulation",
    type=click.Choice(["target", "weights"]),
    default="target",
    show_default=True,
    help="What the main figures are of: activations and KV cache rounded as the target would, or weights alone. Both "
    "are measured.",
)
@click.option("--prompts", type=PATH, help="Prompts to answer side by side: one per line, or JSONL.")
@click.option(
    "--generations", type=int, help="How many prompts. Default: all of --prompts, or 4 taken from the text."
)
@click.option("--output", type=PATH, metavar="FILE", help="Write the report as JSON.")
@click.option(
    "--state",
    type=PATH,
    metavar="DIR",
    help="Where finished batches are kept, so that a run that was killed goes on. Default: in the user's cache.",
)
@task_options
@gate_options
@force_option
@device_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    directory: Path,
    baseline: str | None,
    data: tuple[str, ...],
    max_tokens: int,
    window: int,
    stride: int | None,
    emulation: str,
    prompts: Path | None,
    generations: int | None,
    tasks: AskedTasks | None,
    output: Path | None,
    state: Path | None,
    force: bool,
    device: str,
    as_json: bool,
    **limits: float | None,
) -> None:
    """Run the bytes of a checkpoint or engine on held-out text: perplexity, and KL and agreement with a baseline.

    Exit status 1 when a gate is not passed; an engine is marked then, and `toolchain triton` refuses it.
    """
    from toolchain.core.files import atomic_write_json, refuse_file
    from toolchain.evaluate.checkpoint import evaluate_checkpoint
    from toolchain.evaluate.gates import Gates, apply_gates
    from toolchain.models.reader import resolve_model

    gates = Gates(**limits)
    gates.require_baseline(baseline)
    if output is not None:
        refuse_file(output, force=force)
    source = resolve_model(baseline) if baseline else None
    sources = data or _own_text(source, required=tasks is None or bool(gates.asked))
    report: dict[str, Any] = {"checkpoint": str(directory)}
    if sources:
        report = evaluate_checkpoint(
            directory,
            baseline=source,
            data=sources,
            max_tokens=max_tokens,
            window=window,
            stride=stride,
            device=device,
            emulation=emulation,
            prompts=prompts,
            generations=generations,
            state=state or _default_state(directory, source, *sources),
            progress=Terminal(),
        )
    failed = apply_gates(directory, report, gates) if sources else []
    if tasks is not None:
        report["tasks"] = tasks.run(directory, device=device, emulation=emulation)
    if output is not None:
        atomic_write_json(output, report)
    lines = [render(report)] if sources else []
    lines += [render_tasks(report["tasks"])] if tasks else []
    lines += [*([""] if failed else []), *map(str, failed)]
    emit(report, as_json, "\n".join(lines) + (f"\n\nwritten to {output}" if output else ""))
    if failed:
        ctx.exit(1)


def _own_text(source: Path | None, *, required: bool) -> tuple[str, ...]:
    own = source / "evaluation.jsonl" if source else None
    if own is None or not own.is_file():
        if not required:
            return ()
        raise UsageError("no text to evaluate on", hint="give --data a text or JSONL file", code="TC-520")
    return (str(own),)


def _default_state(directory: Path, source: Path | None, *data: str) -> Path | None:
    """None where the user's cache cannot be written: then a run that is killed begins anew."""
    from toolchain.evaluate.state import cache_directory

    found = cache_directory(directory, source, *data)
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        Terminal().note(f"{found.parent} cannot be made ({error.strerror}): this run cannot be continued")
        return None
    return found
