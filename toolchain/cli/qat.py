"""toolchain qat"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from toolchain.cli.making import Making, judging_options, make, making_options, numbers_options
from toolchain.cli.options import engine_path, format_option
from toolchain.cli.output import Terminal
from toolchain.cli.training import training_options

OWN = ("chat_template", "seed")
"""Options that calibration has, too: with an engine they speak of the training alone."""


@click.command(name="qat")
@click.argument("model", metavar="ENGINE|MODEL")
@format_option
@training_options
@numbers_options
@judging_options
@making_options("<name>-<method>")
@click.pass_context
def command(ctx: click.Context, model: str, format_name: str | None, **options: Any) -> None:
    """Train with fake quantization, then make the engine: what four bits take, got back before the export.

    By default the quantized model is distilled from the unquantized one (--method qad). With an ENGINE, its model,
    plan and calibration are taken, so --format is not needed; options given here win. A training that was ended goes on
    from its newest checkpoint with the same command. Otherwise as `toolchain engine`.
    """
    from toolchain.pipeline.request import EngineRequest
    from toolchain.qat.external import follow

    making = Making.taken_from(options)
    request = EngineRequest(**_values(ctx, model, format_name, options, Terminal()))
    # One of several processes that torchrun or `accelerate launch` started follows the first.
    if making.dry_run or not follow():
        make(ctx, request, _name(request), making)


def _values(
    ctx: click.Context, model: str, format_name: str | None, options: dict[str, Any], progress: Terminal
) -> dict[str, Any]:
    """Fields of ``EngineRequest``: the options, those of an engine below the ones that were typed."""
    from toolchain.pipeline.start import find_start, read_start
    from toolchain.pipeline.training_request import TrainingRequest

    typed = {key for key in options if ctx.get_parameter_source(key) is ParameterSource.COMMANDLINE}
    names = {item.name for item in fields(TrainingRequest)} - set(OWN)
    training = {key: options.pop(key) for key in sorted(names & set(options))}
    found = find_start(str(engine_path(model)))
    if found is None:
        return {"model": model, "format": format_name, **options, "training": training}
    start = read_start(found)
    training |= {key: options[key] for key in OWN if key in typed}
    given = {key: value for key, value in options.items() if key in typed and key not in OWN}
    if format_name:
        given["format"] = format_name
    taken = start.options()
    if given.get("format", taken["format"]) != taken["format"]:  # what fits one format need not fit another
        taken = {key: value for key, value in taken.items() if key not in ("recipe", "policy")}
    for key, value in given.items():
        if key in taken and taken[key] != value:
            progress.note(f"--{key.replace('_', '-')} {value} instead of the engine's {taken[key]}")
    return {**options, **taken, **given, "training": training, "start": str(found)}


def _name(request: Any) -> str:
    """Of the engine; one that starts from an engine is called after it."""
    if request.start is None:
        return str(request.engine_name())
    return f"{Path(request.start).name}{request.training_options().suffix}"
