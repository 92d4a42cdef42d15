"""Which part of the model gets which format, and how many bytes that makes on disk, to the byte."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from toolchain.core.roles import QUANTIZABLE, Role
from toolchain.families.base import Family
from toolchain.formats.base import DTYPE_BYTES, Format
from toolchain.models.types import LinearInfo, ModelInfo, TensorInfo
from toolchain.plan.policy import KEPT, Policy
from toolchain.plan.types import SOURCE_DTYPE, Assignment

KV_SCALE_BYTES = 2 * DTYPE_BYTES["F32"]
"""``k_proj.k_scale`` and ``v_proj.v_scale``, one FP32 scalar each, per attention layer with an FP8 KV cache.
"""

KV_PROJECTION = "k_proj"
"""Scales of the KV cache are stored beside k_proj and v_proj: a layer without them cannot have any."""


@dataclass(kw_only=True)
class _Sums:
    modules: int = 0
    parameters: int = 0
    source_bytes: int = 0
    planned_bytes: int = 0
    projections: set[str] = field(default_factory=set)


def assign(info: ModelInfo, format: Format, policy: Policy, kv_cache: str = "none") -> tuple[Assignment, ...]:
    """One assignment per role and decoder layer that a policy may quantize, one per role for the rest.

    Together they cover every tensor once: ``source_bytes`` add up to the source, ``planned_bytes`` to the
    checkpoint.
    """
    sums: dict[tuple[Role, int | None], _Sums] = defaultdict(_Sums)
    for tensor in info.tensors:
        _add_tensor(sums, info, tensor)
    for linear in info.linears:
        part = linear.part
        if part.role in QUANTIZABLE:
            entry = sums[part.role, part.layer]
            entry.modules += 1
            entry.projections.add(part.projection)
            if part.role in policy.roles:
                source = linear.parameters * DTYPE_BYTES[linear.dtype]
                entry.planned_bytes += stored_bytes(info.family, linear, format) - source
    if kv_cache != "none":
        for (role, _), entry in sums.items():
            if role is Role.ATTENTION and KV_PROJECTION in entry.projections:
                entry.planned_bytes += KV_SCALE_BYTES
    return tuple(_assignments(sums, format, policy, info.parameters))


def _add_tensor(sums: dict[tuple[Role, int | None], _Sums], info: ModelInfo, tensor: TensorInfo) -> None:
    part = info.part(tensor.name)
    quantizable = part.role in QUANTIZABLE
    entry = sums[part.role, part.layer if quantizable else None]
    entry.modules += 0 if quantizable else 1
    entry.parameters += tensor.parameters
    entry.source_bytes += tensor.bytes
    entry.planned_bytes += tensor.bytes


def _assignments(
    sums: dict[tuple[Role, int | None], _Sums], format: Format, policy: Policy, total: int
) -> Iterator[Assignment]:
    shares: dict[Role, int] = defaultdict(int)
    for (role, _), entry in sums.items():
        shares[role] += entry.parameters
    order = list(Role)
    for (role, layer), entry in sorted(
        sums.items(), key=lambda item: (order.index(item[0][0]), -1 if item[0][1] is None else item[0][1])
    ):
        quantized = role in policy.roles
        yield Assignment(
            role=role.value,
            layer=layer,
            format=format.name if quantized else SOURCE_DTYPE,
            reason=_reason(role, policy, shares[role] / total),
            modules=entry.modules,
            parameters=entry.parameters,
            source_bytes=entry.source_bytes,
            planned_bytes=entry.planned_bytes,
        )


def _reason(role: Role, policy: Policy, share: float) -> str:
    if role in KEPT:
        return KEPT[role]
    held = f"{share:.1%} of the parameters"
    return f"policy {policy.name} {'quantizes' if role in policy.roles else 'leaves out'} this part ({held})"


def stored_bytes(family: Family, linear: LinearInfo, format: Format) -> int:
    """Bytes on disk of one quantized matrix, all of its scales included.

    A ``pre_quant_scale`` is written for every matrix, except where the norm before it feeds nothing else and
    absorbs it.
    """
    size = format.stored_bytes(linear.out_features, linear.in_features, source_dtype=linear.dtype)
    if any(item.suffix == "pre_quant_scale" for item in format.stored) and not is_folded(family, linear):
        size += linear.in_features * DTYPE_BYTES[linear.dtype]
    return size


def is_folded(family: Family, linear: LinearInfo) -> bool:
    """True when a norm of the same layer feeds this matrix and its fused siblings only."""
    inside = re.split(family.layer_pattern, linear.name)[-1]
    return any(inside in consumers for _, consumers in family.norm_folds)


def quantized_linears(info: ModelInfo, policy: Policy) -> Iterable[LinearInfo]:
    """The matrices that ``policy`` gives the format to."""
    return (linear for linear in info.linears if linear.part.role in policy.roles)
