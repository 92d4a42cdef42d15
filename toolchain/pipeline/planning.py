"""From a request to a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.core.errors import UsageError
from toolchain.evaluate.gates import option
from toolchain.models.types import ModelInfo
from toolchain.pipeline.request import EngineRequest
from toolchain.pipeline.training_plan import with_training
from toolchain.plan.policy import CUSTOM
from toolchain.plan.types import SOURCE_DTYPE, Plan, Serving
from toolchain.recipes import is_recipe_file

if TYPE_CHECKING:
    from toolchain.auto.space import Space

PLACEMENT = (
    "tp",
    "ep",
    "pp",
    "attention_dp",
    "max_num_tokens",
    "chunked_prefill",
    "moe_backend",
    "eplb_slots",
    "eplb_layer_updates",
)
"""Fields of ``Serving`` that are passed on as they are; the others have defaults that depend on the model."""


def make_request_plan(request: EngineRequest, info: ModelInfo | None = None) -> Plan:
    """Read the model's headers and plan; violations are in ``plan.findings``. Of ``--format auto``, which measures
    first, the smallest plan that it could choose. ``info``: what was read of the model before."""
    from toolchain.models.reader import read_model
    from toolchain.plan.planner import make_plan

    info = info or read_model(request.model, trust_remote_code=request.trust_remote_code)
    if request.is_auto:
        from toolchain.auto.outcome import preview

        plan = preview(find_request_space(request, info))
    elif request.start is not None:
        plan = _started(request, info, request.start)
    else:
        plan = make_plan(
            info,
            **_numbers(request, info),
            **_surroundings(request, info),
            sparsity=request.sparsity_options(),
        )
    return with_argument_findings(with_training(request, plan, info))


def _started(request: EngineRequest, info: ModelInfo, directory: str) -> Plan:
    """The plan of an engine again, part by part; of the options, where one asks for other numbers than it has."""
    from toolchain.pipeline.start import read_start
    from toolchain.plan.planner import make_plan

    start = read_start(Path(directory))
    if start.asks_for(request):
        return start.named(make_plan(info, **start.numbers(), **_surroundings(request, info)))
    return make_plan(
        info,
        **_numbers(request, info),
        **_surroundings(request, info),
        sparsity=request.sparsity_options(),
    )


def with_argument_findings(plan: Plan) -> Plan:
    """``plan`` with what is wrong with the LLM API's arguments that it passes through: known before any work."""
    from toolchain.build.trtllm import plan_findings

    return replace(plan, findings=(*plan.findings, *plan_findings(plan)))


def find_request_space(request: EngineRequest, info: ModelInfo | None = None) -> Space:
    """What ``--format auto`` searches. See ``toolchain.auto.space.find_space`` for what it raises."""
    from toolchain.auto.space import find_space
    from toolchain.models.reader import read_model

    info = info or read_model(request.model, trust_remote_code=request.trust_remote_code)
    return find_space(
        info,
        request.auto(),
        policy=request.policy,
        policy_options=request.policy_options(),
        recipe=request.recipe,
        kv_cache=request.kv_cache,
        **_surroundings(request, info),
    )


def _surroundings(request: EngineRequest, info: ModelInfo) -> dict[str, Any]:
    """What a plan is made for, whatever the numbers are."""
    from toolchain.plan.planner import DEFAULT_BATCH_SIZE, DEFAULT_SEQ_LEN

    length, batch = request.max_seq_len, request.max_batch_size
    return {
        "gpu": request.gpu,
        "target": request.target,
        "target_version": request.trtllm_version,
        "serving": Serving(
            max_batch_size=DEFAULT_BATCH_SIZE if batch is None else batch,
            max_seq_len=min(DEFAULT_SEQ_LEN, info.max_position_embeddings) if length is None else length,
            **{name: getattr(request, name) for name in PLACEMENT},
            llm_args=request.llm_args or {},
        ),
        "calibration": request.calibration(),
    }


def _numbers(request: EngineRequest, info: ModelInfo) -> dict[str, Any]:
    """What decides the stored numbers: the options, or a recipe file where one is given.

    UsageError TC-159 when options contradict the file.
    """
    if not is_recipe_file(request.recipe):
        return {
            "format": request.format,
            "policy": request.policy,
            "policy_options": request.policy_options(),
            "recipe": request.recipe,
            "kv_cache": request.kv_cache,
        }
    from toolchain.quantize.recipe_file import read_recipe_file

    found = read_recipe_file(str(request.recipe), info)
    used = sorted({item.format for item in found.overrides} - {SOURCE_DTYPE})
    said = {"policy": request.policy} if request.policy else {}
    problems = [f"{option(name)} {value}" for name, value in (said | request.policy_options().said).items()]
    if request.format not in (None, *used):
        problems.append(f"--format {request.format} (it has {', '.join(used)})")
    if request.kv_cache not in ("none", found.kv_cache):
        problems.append(f"--kv-cache {request.kv_cache} (it has {found.kv_cache})")
    if problems:
        raise UsageError(
            f"recipe {request.recipe} says itself which part gets what, against {'; '.join(problems)}",
            hint="leave these options out, or use ingredients (`toolchain list recipes`) instead of a file",
            code="TC-159",
        )
    return {
        "format": found.format,
        "policy": CUSTOM.name,
        "overrides": found.overrides,
        "recipe": found.recipe,
        "kv_cache": found.kv_cache,
    }
