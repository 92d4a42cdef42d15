"""ModelInfo + Format + Policy + Target + Gpu -> Plan. Pure: reads no file and loads no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.findings import errors
from toolchain.core.gpus import get_gpu
from toolchain.formats import KV_CACHES, get_format
from toolchain.models.reader import model_identity
from toolchain.models.types import ModelInfo
from toolchain.plan.assign import assign
from toolchain.plan.checks import memory_findings, request_findings
from toolchain.plan.estimate import estimate
from toolchain.plan.policy import default_policy, get_policy
from toolchain.plan.types import Calibration, Plan, Serving
from toolchain.targets import get_target, parse_version

DEFAULT_BATCH_SIZE = 8
DEFAULT_SEQ_LEN = 4096


class PlanRefused(FindingsError):
    """The plan has errors: the request has to change. Exit status 2."""

    exit_code = 2


def make_plan(
    info: ModelInfo,
    *,
    format: str,
    policy: str | None = None,
    kv_cache: str = "none",
    gpu: str = "cpu",
    target: str = "local",
    target_version: str | None = None,
    serving: Serving | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The resolved plan, with every violation and warning in ``findings``.

    Raises UsageError only for names that do not exist (format, policy, KV cache, GPU, target, release
    number). ``serving`` None means batches of 8 with 4096 tokens, or as many as the model has positions for.
    """
    chosen_format, chosen_gpu, chosen_target = get_format(format), get_gpu(gpu), get_target(target)
    chosen_policy = get_policy(policy) if policy else default_policy(chosen_format, is_moe=info.is_moe)
    if kv_cache not in KV_CACHES:
        raise UsageError(f"unknown KV cache {kv_cache!r}; known: {', '.join(KV_CACHES)}", code="TC-107")
    version = str(parse_version(target_version or chosen_target.default_version))
    serving = serving or Serving(
        max_batch_size=DEFAULT_BATCH_SIZE, max_seq_len=min(DEFAULT_SEQ_LEN, info.max_position_embeddings)
    )
    calibration = calibration or Calibration(data="")
    findings = request_findings(
        info,
        format=chosen_format,
        policy=chosen_policy,
        kv_cache=kv_cache,
        gpu=chosen_gpu,
        target=chosen_target,
        version=version,
        serving=serving,
    )
    assignments = assign(info, chosen_format, chosen_policy, kv_cache)
    estimates = estimate(
        info,
        assignments,
        format=chosen_format,
        policy=chosen_policy,
        kv_cache=kv_cache,
        gpu=chosen_gpu,
        serving=_computable(serving),
        calibration=calibration,
    )
    findings += memory_findings(
        info, estimates, kv_cache=kv_cache, gpu=chosen_gpu, serving=_computable(serving)
    )
    return Plan(
        model=_absolute(info),
        family=info.family.name,
        architecture=info.architecture,
        model_identity=model_identity(info),
        format=chosen_format.name,
        policy=chosen_policy.name,
        kv_cache=kv_cache,
        gpu=chosen_gpu.name,
        target=chosen_target.name,
        target_version=version,
        serving=serving,
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


def _computable(serving: Serving) -> Serving:
    """Limits of at least 1: the finding about the others is there already, and the arithmetic goes on."""
    values = {
        name: max(1, getattr(serving, name)) for name in ("max_batch_size", "max_seq_len", "tp", "ep", "pp")
    }
    return replace(serving, **values)
