"""ModelInfo + Format + Policy + Target + Gpu -> Plan. Pure: reads no file and loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.findings import errors
from toolchain.core.gpus import Gpu, get_gpu
from toolchain.formats import KV_CACHES, get_format
from toolchain.formats.base import Format
from toolchain.models.reader import model_identity
from toolchain.models.types import ModelInfo
from toolchain.plan.assign import assign
from toolchain.plan.calibration import calibration_findings
from toolchain.plan.checks import memory_findings, recipe_findings, request_findings
from toolchain.plan.estimate import estimate
from toolchain.plan.memory import held_kv_cache
from toolchain.plan.policy import Policy, default_policy, get_policy
from toolchain.plan.types import Calibration, Plan, Serving
from toolchain.recipes import Recipe, get_recipe
from toolchain.targets import Target, get_target, parse_version

DEFAULT_BATCH_SIZE = 8
DEFAULT_SEQ_LEN = 4096


class PlanRefused(FindingsError):
    """The plan has errors: the request has to change. Exit status 2."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the user asked for, names resolved."""

    format: Format
    policy: Policy
    recipe: Recipe
    kv_cache: str
    gpu: Gpu
    target: Target
    version: str
    serving: Serving


def make_plan(
    info: ModelInfo,
    *,
    format: str,
    policy: str | None = None,
    recipe: str | None = None,
    kv_cache: str = "none",
    gpu: str = "cpu",
    target: str = "local",
    target_version: str | None = None,
    serving: Serving | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The resolved plan, with every violation and warning in ``findings``.

    Raises UsageError only for names that do not exist (format, policy, KV cache, GPU, target, release number).
    ``serving`` None means batches of 8 with 4096 tokens, or as many as the model has positions for.
    """
    if kv_cache not in KV_CACHES:
        raise UsageError(f"unknown KV cache {kv_cache!r}; known: {', '.join(KV_CACHES)}", code="TC-107")
    chosen, runner = get_format(format), get_target(target)
    request = _Request(
        format=chosen,
        policy=get_policy(policy) if policy else default_policy(chosen, is_moe=info.is_moe),
        recipe=get_recipe(recipe, chosen),
        kv_cache=kv_cache,
        gpu=get_gpu(gpu),
        target=runner,
        version=str(parse_version(target_version or runner.default_version)),
        serving=serving or _default_serving(info),
    )
    return _plan(info, request, calibration or Calibration(data=""))


def _plan(info: ModelInfo, request: _Request, calibration: Calibration) -> Plan:
    names = {item.name: getattr(request, item.name) for item in fields(request)}
    del names["recipe"]
    findings = [*request_findings(info, **names), *calibration_findings(info, calibration)]
    findings += recipe_findings(info, request.recipe, request.policy)
    del names["version"]
    computable = _computable(request.serving)
    assignments = assign(info, request.format, request.policy, request.kv_cache)
    estimates = estimate(info, assignments, calibration=calibration, **(names | {"serving": computable}))
    findings += memory_findings(
        info,
        estimates,
        kv_cache=held_kv_cache(request.target, request.kv_cache),
        gpu=request.gpu,
        target=request.target,
        serving=computable,
    )
    return Plan(
        model=_absolute(info),
        family=info.family.name,
        architecture=info.architecture,
        model_identity=model_identity(info),
        format=request.format.name,
        policy=request.policy.name,
        recipe=request.recipe.name,
        kv_cache=request.kv_cache,
        gpu=request.gpu.name,
        target=request.target.name,
        target_version=request.version,
        serving=request.serving,
        calibration=calibration,
        assignments=assignments,
        estimates=estimates,
        findings=tuple(findings),
    )


def require_clean(plan: Plan) -> Plan:
    """``plan`` itself; PlanRefused (exit 2) with all findings when one of them is an error."""
    found = errors(plan.findings)
    if found:
        problems = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise PlanRefused(
            f"{plan.model} cannot become a {plan.format} engine for {plan.target} on "
            f"{plan.gpu} as asked: {problems}",
            plan.findings,
            hint="each finding says what would work; `toolchain plan` shows the whole plan",
            code="TC-100",
        )
    return plan


def _absolute(info: ModelInfo) -> str:
    return (
        str(Path(info.source).expanduser().resolve())
        if Path(info.source).expanduser().is_dir()
        else info.source
    )


def _default_serving(info: ModelInfo) -> Serving:
    return Serving(
        max_batch_size=DEFAULT_BATCH_SIZE, max_seq_len=min(DEFAULT_SEQ_LEN, info.max_position_embeddings)
    )


def _computable(serving: Serving) -> Serving:
    """Limits of at least 1: the finding about the others is there already, and the arithmetic goes on."""
    values = {
        name: max(1, getattr(serving, name)) for name in ("max_batch_size", "max_seq_len", "tp", "ep", "pp")
    }
    return replace(serving, **values)
