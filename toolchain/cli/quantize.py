"""toolchain quantize"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import (
    PATH,
    auto_options,
    calibration_options,
    device_option,
    dry_run_option,
    executor_options,
    force_option,
    format_option,
    json_option,
    kv_cache_option,
    policy_option,
    recipe_option,
    seed_option,
    sparsity_options,
    stream_option,
    trust_option,
)
from toolchain.cli.output import Terminal, emit, facts, size
from toolchain.cli.placement import placement_options
from toolchain.cli.plan_text import render_coverage, render_plan


@click.command(name="quantize")
@click.argument("model")
@format_option
@click.option("--output", type=PATH, required=True, help="Directory of the quantized checkpoint.")
@auto_options
@policy_option
@recipe_option
@sparsity_options
@kv_cache_option
@calibration_options
@placement_options
@stream_option
@executor_options
@seed_option
@device_option
@trust_option
@dry_run_option
@force_option
@json_option
def command(
    model: str,
    format_name: str | None,
    output: Path,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize MODEL into a checkpoint in the unified Hugging Face layout."""
    from toolchain.core.files import refuse_occupied, refuse_to_replace_source
    from toolchain.pipeline.planning import make_request_plan
    from toolchain.pipeline.request import EngineRequest
    from toolchain.plan.planner import require_clean

    progress = Terminal()
    request = EngineRequest(model=model, format=format_name, **options)
    plan = require_clean(make_request_plan(request))
    refuse_to_replace_source(output, Path(plan.model))
    refuse_occupied(output, force=force)
    if dry_run:
        emit(plan.to_json(), as_json, render_plan(plan))
        return
    from toolchain.quantize.job import quantize

    if request.is_auto:
        from toolchain.pipeline.auto import choose_formats

        record = output.with_name(f"{output.name}.auto.json")
        plan = choose_formats(request, plan, record, force=force, progress=progress)
    manifest = quantize(
        plan,
        output,
        device=request.device,
        force=force,
        trust_remote_code=request.trust_remote_code,
        stream=request.stream,
        executor=request.executor_options(),
        progress=progress,
    )
    text = facts(
        [
            ("checkpoint", output),
            ("tensors", size(manifest["tensor_bytes"])),
            *(
                [("auto", f"{plan.auto['verdict']['kept']} kept, {plan.auto['verdict']['reason']}")]
                if plan.auto
                else []
            ),
            ("calibration", _calibration(manifest["calibration"])),
            ("expert coverage", render_coverage(manifest)),
            ("seconds", manifest["seconds"]),
            ("next", f"toolchain verify {output} --against {model}"),
        ]
    )
    emit(manifest, as_json, text)


def _calibration(made: dict[str, Any] | None) -> str:
    if made is None:
        return "none needed"
    sources = made["source"] if isinstance(made["source"], list) else [made["source"]]
    return f"{made['samples']} samples of {made['length_tokens']} tokens from {', '.join(sources)}"
