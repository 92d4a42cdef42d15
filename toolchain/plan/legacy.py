"""What target ``tensorrt`` cannot do with a model, whatever the GPU: refused before anything is quantized."""

from __future__ import annotations

from collections.abc import Iterator

from toolchain.core.findings import Finding
from toolchain.core.roles import QUANTIZABLE, Role
from toolchain.models.types import ModelInfo
from toolchain.plan.choices import Choices
from toolchain.plan.types import SOURCE_DTYPE, Serving
from toolchain.targets.base import Target
from toolchain.targets.tensorrt import TENSORRT, mixture_refusals, model_refusals


def legacy_findings(info: ModelInfo, choices: Choices, target: Target, serving: Serving) -> Iterator[Finding]:
    """Every reason why no rank files can be written for trtllm-build; none for other targets."""
    if target.name != TENSORRT.name:
        return
    for reason in model_refusals(info.architecture, info.config):
        yield Finding(
            code="TC-127",
            where=f"--target {target.name}",
            message=f"trtllm-build has no checkpoint for it here: {reason}",
            hint="use --target trtllm, which loads the unified checkpoint",
        )
    roles: dict[str, set[str]] = {}
    head = ""
    for linear in info.linears:
        found = choices.format_of(linear)
        if linear.part.role is Role.LM_HEAD:
            head = found.name if found else ""
        elif linear.part.role in QUANTIZABLE:
            roles.setdefault(linear.part.role.value, set()).add(found.name if found else SOURCE_DTYPE)
    frozen = {role: frozenset(names) for role, names in roles.items()}
    for reason in mixture_refusals(frozen, pp=serving.pp, head_format=head or None):
        yield Finding(
            code="TC-127",
            where=f"--target {target.name}",
            message=f"trtllm-build has no checkpoint for it here: {reason}",
            hint="use one format for whole roles (--shared-experts, --attention, --lm-head), or --target trtllm",
        )
