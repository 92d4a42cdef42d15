"""ModelInfo + Format + Policy + Target + Gpu -> Plan. Pure: reads no file and loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.findings import Finding, errors
from toolchain.core.gpus import Gpu, get_gpu
from toolchain.formats import KV_CACHES, get_format
from toolchain.formats.base import Format
from toolchain.models.reader import model_identity
from toolchain.models.types import ModelInfo
from toolchain.plan.assign import assign
from toolchain.plan.calibration import calibration_findings
from toolchain.plan.checks import memory_findings, parts_of, recipe_findings, request_findings
from toolchain.plan.choices import Choices, Override, choose
from toolchain.plan.estimate import estimate
from toolchain.plan.memory import held_kv_cache
from toolchain.plan.parallel import COUNTS
from toolchain.plan.policy import CUSTOM, Policy, PolicyOptions, default_policy, get_policy
from toolchain.plan.rules import policy_findings
from toolchain.plan.sparsity import sparsity_findings, with_sparsity
from toolchain.plan.steps import Sparsity
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
    options: PolicyOptions
    overrides: tuple[Override, ...]
    recipe: Recipe
    kv_cache: str
    gpu: Gpu
    target: Target
    version: str
    serving: Serving
    sparsity: Sparsity | None = None


def make_plan(
    info: ModelInfo,
    *,
    format: str,
    policy: str | None = None,
    policy_options: PolicyOptions | None = None,
    overrides: Iterable[Override] = (),
    recipe: str | None = None,
    kv_cache: str = "none",
    gpu: str = "cpu",
    target: str = "local",
    target_version: str | None = None,
    serving: Serving | None = None,
    calibration: Calibration | None = None,
    sparsity: Sparsity | None = None,
) -> Plan:
    """The resolved plan, with every violation and warning in ``findings``.

    Raises UsageError only for names that do not exist (format, policy, KV cache, GPU, target, release number).
    ``overrides`` win over the policy, and never over a hard rule; ``policy`` "custom" quantizes what they say and
    nothing else. ``serving`` None means batches of 8 with 4096 tokens, or as many as the model has positions for.
    """
    if kv_cache not in KV_CACHES:
        raise UsageError(f"unknown KV cache {kv_cache!r}; known: {', '.join(KV_CACHES)}", code="TC-107")
    chosen, runner = get_format(format), get_target(target)
    request = _Request(
        format=chosen,
        policy=_policy(policy, chosen, info),
        options=policy_options or PolicyOptions(),
        overrides=tuple(overrides),
        recipe=get_recipe(recipe, chosen),
        kv_cache=kv_cache,
        gpu=get_gpu(gpu),
        target=runner,
        version=str(parse_version(target_version or runner.default_version)),
        serving=serving or _default_serving(info),
        sparsity=sparsity,
    )
    return _plan(info, request, calibration or Calibration(data=""))


def _policy(name: str | None, format: Format, info: ModelInfo) -> Policy:
    if name == CUSTOM.name:
        return CUSTOM
    return get_policy(name) if name else default_policy(format, is_moe=info.is_moe)


def _choices(info: ModelInfo, request: _Request) -> Choices:
    return choose(
        info,
        request.format,
        request.policy,
        request.options,
        request.overrides,
        mixes=_mixes(info, request),
    )


def _mixes(info: ModelInfo, request: _Request) -> bool:
    """Whether FP8 beside the main format runs: on this GPU, and in a checkpoint of this family."""
    target, sm, version = request.target, request.gpu.sm, request.version
    if target.mixes(info.family.name, is_moe=info.is_moe, version=version) != "yes":
        return False
    # Without a GPU, as in a first look, nothing speaks against it.
    return sm == 0 or target.find(format_name="fp8", sm=sm, model="dense", version=version) is not None


def _findings(info: ModelInfo, request: _Request, choices: Choices) -> list[Finding]:
    return [
        *policy_findings(
            info,
            choices,
            format=request.format,
            policy=request.policy,
            options=request.options,
            overrides=request.overrides,
        ),
        *request_findings(
            info,
            choices=choices,
            format=request.format,
            kv_cache=request.kv_cache,
            gpu=request.gpu,
            target=request.target,
            version=request.version,
            serving=request.serving,
        ),
        *recipe_findings(info, request.recipe, choices),
        *sparsity_findings(
            info,
            request.sparsity,
            choices,
            recipe=request.recipe,
            target=request.target,
            version=request.version,
            gpu=request.gpu,
            parts=parts_of(info, choices, request.format),
        ),
    ]


def _plan(info: ModelInfo, request: _Request, calibration: Calibration) -> Plan:
    choices = _choices(info, request)
    findings = [*_findings(info, request, choices), *calibration_findings(info, calibration)]
    computable = _computable(request.serving)
    assignments = assign(info, choices, request.kv_cache)
    estimates = estimate(
        info,
        assignments,
        choices=choices,
        recipe=request.recipe,
        kv_cache=request.kv_cache,
        gpu=request.gpu,
        target=request.target,
        serving=computable,
        calibration=calibration,
    )
    estimates = with_sparsity(estimates, info, request.sparsity, choices)
    findings += memory_findings(
        info,
        choices,
        estimates,
        kv_cache=held_kv_cache(request.target, request.kv_cache, request.gpu.sm),
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
        policy_options=request.options,
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
        sparsity=request.sparsity,
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
    return replace(serving, **{name: max(1, getattr(serving, name)) for name in COUNTS})
