"""toolchain qat"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from toolchain.cli.engine import summary
from toolchain.cli.options import (
    PATH,
    auto_options,
    calibration_options,
    device_option,
    dry_run_option,
    engine_path,
    force_option,
    format_option,
    gate_options,
    json_option,
    kv_cache_option,
    policy_option,
    recipe_option,
    seed_option,
    sparsity_options,
    trust_option,
)
from toolchain.cli.output import Terminal, emit
from toolchain.cli.placement import placement_options
from toolchain.cli.plan_text import render_plan
from toolchain.cli.training import training_options
from toolchain.core.findings import errors

OWN = ("chat_template", "seed")
"""Options that calibration has, too: with an engine they speak of the training alone."""


@click.command(name="qat")
@click.argument("model", metavar="ENGINE|MODEL")
@format_option
@training_options
@auto_options
@policy_option
@recipe_option
@sparsity_options
@kv_cache_option
@placement_options
@calibration_options
@click.option(
    "--eval-data", help="Text to judge the engine on. Default: evaluation.jsonl of MODEL, if it has one."
)
@click.option("--eval-tokens", type=int, default=16_384, show_default=True, help="Tokens to judge on.")
@gate_options
@click.option("--output", type=PATH, help="Engine directory. Default: engines/<name>-<method>.")
@click.option("--triton-output", type=PATH, help="Triton repository. Default: triton_repo/<name>.")
@seed_option
@device_option
@trust_option
@dry_run_option
@force_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    format_name: str | None,
    output: Path | None,
    triton_output: Path | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train with fake quantization, then make the engine: what four bits take, got back before the export.

    By default the quantized model is distilled from the unquantized one (--method qad). With an ENGINE, its model,
    plan and calibration are taken, so --format is not needed; options given here win. A training that was ended goes on
    from its newest checkpoint with the same command. Otherwise as `toolchain engine`.
    """
    from toolchain.pipeline.engine import make_engine
    from toolchain.pipeline.planning import make_request_plan
    from toolchain.pipeline.request import EngineRequest
    from toolchain.qat.external import follow

    values = _values(ctx, model, format_name, options, Terminal())
    request = EngineRequest(**values)
    directory = output or Path("engines") / _name(request)
    repository = triton_output or Path("triton_repo") / directory.name
    if dry_run:
        plan = make_request_plan(request)
        emit(plan.to_json(), as_json, f"{render_plan(plan)}\n\nwould write {directory} and {repository}")
        if errors(plan.findings):
            ctx.exit(2)
        return
    if follow():  # one of several processes that torchrun or `accelerate launch` started, and not the first
        return
    result = make_engine(
        request, directory, repository, command=["toolchain", *sys.argv[1:]], force=force, progress=Terminal()
    )
    emit(result.manifest, as_json, summary(result))


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
