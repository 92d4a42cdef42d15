"""toolchain evaluate"""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli.options import ENGINE, PATH, device_option, json_option
from toolchain.cli.output import Terminal, emit, facts
from toolchain.core.errors import UsageError


@click.command(name="evaluate")
@click.argument("directory", metavar="DIR", type=ENGINE)
@click.option("--baseline", metavar="MODEL", help="The model that it was made of: adds KL and agreement.")
@click.option(
    "--data", type=PATH, help="Text or JSONL. Default: evaluation.jsonl of the baseline, if it has one."
)
@click.option("--max-tokens", type=int, default=16_384, show_default=True, help="Tokens to judge on.")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens of context.")
@device_option
@json_option
def command(
    directory: Path,
    baseline: str | None,
    data: Path | None,
    max_tokens: int,
    window: int,
    device: str,
    as_json: bool,
) -> None:
    """Run the bytes of a checkpoint or engine on held-out text: perplexity, and KL and agreement with a baseline."""
    from toolchain.evaluate.checkpoint import evaluate_checkpoint
    from toolchain.models.reader import resolve_model

    source = resolve_model(baseline) if baseline else None
    own = source / "evaluation.jsonl" if source else None
    data = data or (own if own and own.is_file() else None)
    if data is None:
        raise UsageError("no text to evaluate on", hint="give --data a text or JSONL file", code="TC-520")
    report = evaluate_checkpoint(
        directory,
        baseline=source,
        data=data,
        max_tokens=max_tokens,
        window=window,
        device=device,
        progress=Terminal(),
    )
    emit(report, as_json, facts(report.items()))
