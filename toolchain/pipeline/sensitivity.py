"""What ``toolchain sensitivity`` does: plans, held-out windows, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.auto.groups import quantized_groups
from toolchain.core.errors import UsageError
from toolchain.core.progress import Progress
from toolchain.models.reader import read_model, resolve_model
from toolchain.pipeline.request import EngineRequest
from toolchain.plan.planner import make_plan, require_clean
from toolchain.plan.policy import ALL_LINEAR
from toolchain.recipes import is_recipe_file


def measure_sensitivity(
    model: str,
    formats: list[str],
    *,
    data: Path | None,
    eval_tokens: int,
    options: dict[str, Any],
    progress: Progress,
) -> Any:
    """``toolchain.auto.sensitivity.Sensitivity`` of ``model`` in each of ``formats``.

    ``options`` are fields of ``EngineRequest``: policy, recipe, calibration, device. UsageError for names that do not
    exist and for text that is not there, PlanRefused for formats that do not fit.
    """
    if not formats:
        raise UsageError("--format is missing", hint="for example --format nvfp4", code="TC-101")
    if is_recipe_file(options.get("recipe")):
        raise UsageError(
            f"recipe {options['recipe']} is a file that decides formats by itself",
            hint="give --recipe ingredients (`toolchain list recipes`), or leave it out",
            code="TC-159",
        )
    request = EngineRequest(model=model, format=formats[0], **options)
    info = read_model(model, trust_remote_code=request.trust_remote_code)
    plans = [
        require_clean(
            make_plan(
                info,
                format=name,
                policy=request.policy or ALL_LINEAR.name,
                policy_options=request.policy_options(),
                recipe=request.recipe,
                calibration=request.calibration(),
            )
        )
        for name in formats
    ]
    from toolchain.auto.held_out import held_out
    from toolchain.auto.sensitivity import measure, report

    groups = {group.name: group for plan in plans for group in quantized_groups(info, plan)}
    held = held_out(
        plans[0].calibration, resolve_model(model), data=data, tokens=eval_tokens, progress=progress
    )
    scores = measure(
        info,
        plans,
        list(groups.values()),
        held,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
        progress=progress,
    )
    return report(info, plans, scores, held)
