"""Rules on amounts: bytes and formats add up to the plan, and the experts really became smaller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from toolchain.checkpoint.audit.subject import Subject
from toolchain.core.findings import Finding
from toolchain.core.roles import Role
from toolchain.formats import get_format, same_stored
from toolchain.plan.rules import EXPERT_SHARE
from toolchain.plan.types import SOURCE_DTYPE, Plan


def facts(subject: Subject) -> dict[str, Any]:
    """Counts for the verdict."""
    total = sum(info.bytes for info in subject.reader.stored.values())
    parameters = _parameters(subject)
    return {
        "layout": subject.quant.shape,
        "quant_algo": subject.quant.quant_algo,
        "kv_cache_quant_algo": subject.quant.kv_cache_quant_algo,
        "family": subject.family.name,
        "tensors": len(subject.reader.infos),
        "bytes": total,
        "parameters": parameters,
        "effective_bits": round(total * 8 / parameters, 3) if parameters else None,
        "quantized_modules": len(subject.quantized),
        "by_role": dict(Counter(subject.part(module).role.value for module in subject.quantized)),
        "by_algo": dict(Counter(subject.quantized.values())),
        "expert_layers_in_source_dtype": sorted(
            {
                part.layer
                for module in subject.plain
                if (part := subject.part(module)).role is Role.ROUTED_EXPERT
            }
        ),
    }


def _parameters(subject: Subject) -> int:
    """Model parameters: weights as the model has them, without scales."""
    total = 0
    for module, tensors in subject.modules.items():
        shape = subject.weight_shape(module) if module in subject.quantized else None
        for suffix, info in tensors.items():
            if suffix == "weight" and shape:
                total += shape[0] * shape[1] * subject.copies(module)
            elif not suffix.endswith(("_scale", "_scale_2", "_scale_inv")):
                total += info.parameters
    return total


def _matrix_parameters(subject: Subject, module: str) -> int:
    shape = subject.weight_shape(module) if module in subject.quantized else None
    if shape is None:
        return subject.modules[module]["weight"].parameters
    return shape[0] * shape[1] * subject.copies(module)


def anything_quantized(subject: Subject) -> Iterator[Finding]:
    """A checkpoint that claims an algorithm has at least one quantized module."""
    if not subject.quantized:
        yield Finding(
            code="TC-328",
            where=str(subject.directory),
            message=f"claims {subject.quant.quant_algo}, but no module is quantized",
        )


def against_plan(subject: Subject, plan: Plan) -> Iterator[Finding]:
    """Each module has its planned format, experts reach the planned share, and the bytes are the planned bytes."""
    experts = {True: 0, False: 0}
    for module in (*subject.quantized, *subject.plain):
        planned = plan.format_of(subject.family, module)
        found = subject.format_of(module) if module in subject.quantized else None
        actual = found.name if found else SOURCE_DTYPE
        same = found is not None and planned != SOURCE_DTYPE and same_stored(found, get_format(planned))
        if planned != actual and not same:
            yield Finding(
                code="TC-329", where=module, message=f"is stored as {actual}, the plan says {planned}"
            )
        if subject.part(module).role is Role.ROUTED_EXPERT and planned != SOURCE_DTYPE:
            experts[actual != SOURCE_DTYPE] += _matrix_parameters(subject, module)
    count = sum(experts.values())
    if count and experts[True] / count < EXPERT_SHARE:
        yield Finding(
            code="TC-329",
            where="routed experts",
            message=f"{experts[True] / count:.1%} of the parameters that the plan quantizes are, expected at least "
            f"{EXPERT_SHARE:.0%}",
        )
    total = sum(info.bytes for info in subject.reader.infos.values())
    if total != plan.estimates.checkpoint_bytes:
        yield Finding(
            code="TC-330",
            where=str(subject.directory),
            message=f"holds {total} bytes of tensors, the plan says {plan.estimates.checkpoint_bytes}",
        )
