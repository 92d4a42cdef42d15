"""Which part of the model gets which format, and how many bytes that makes on disk, to the byte."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from toolchain.core.roles import ASSIGNABLE, QUANTIZABLE, Role
from toolchain.families.base import Family
from toolchain.formats.base import DTYPE_BYTES, Format
from toolchain.formats.kv import get_kv_cache
from toolchain.models.types import LinearInfo, ModelInfo, TensorInfo
from toolchain.plan.choices import Choice, Choices
from toolchain.plan.types import SOURCE_DTYPE, Assignment

KV_SCALE_BYTES = 2 * DTYPE_BYTES["F32"]
"""``k_proj.k_scale`` and ``v_proj.v_scale``, one FP32 scalar each, per attention layer with a calibrated KV cache.
"""

KV_PROJECTION = "k_proj"
"""Scales of the KV cache are stored beside k_proj and v_proj: a layer without them cannot have any."""

_Key = tuple[Role, int | None]


@dataclass(kw_only=True)
class _Sums:
    modules: int = 0
    parameters: int = 0
    source_bytes: int = 0
    planned_bytes: int = 0

    def add(self, other: _Sums) -> None:
        for name in ("modules", "parameters", "source_bytes", "planned_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(kw_only=True)
class _Part:
    """One role in one layer: what its projections sum up to, and what was decided about each."""

    projections: dict[str, _Sums] = field(default_factory=lambda: defaultdict(_Sums))
    choices: dict[str, Choice] = field(default_factory=dict)


def assign(info: ModelInfo, choices: Choices, kv_cache: str = "none") -> tuple[Assignment, ...]:
    """One assignment per role and decoder layer that a plan may quantize (more where its projections were decided
    apart), one per role for the rest.

    Together they cover every tensor once: ``source_bytes`` add up to the source, ``planned_bytes`` to the
    checkpoint.
    """
    parts: dict[_Key, _Part] = defaultdict(_Part)
    for tensor in info.tensors:
        _add_tensor(parts, info, tensor, choices)
    for linear in info.linears:
        part = linear.part
        if part.role not in ASSIGNABLE:
            continue
        entry = parts[part.role, part.layer if part.role in QUANTIZABLE else None]
        entry.choices[part.projection] = choices.of(part)
        sums = entry.projections[part.projection]
        sums.modules += 1 if part.role in QUANTIZABLE else 0
        chosen = choices.format_of(linear)
        if chosen is not None:
            source = linear.parameters * DTYPE_BYTES[linear.dtype]
            sums.planned_bytes += stored_bytes(info.family, linear, chosen, choices) - source
    if get_kv_cache(kv_cache).calibrated:
        for (role, _), entry in parts.items():
            if role is Role.ATTENTION and KV_PROJECTION in entry.projections:
                entry.projections[KV_PROJECTION].planned_bytes += KV_SCALE_BYTES
    return tuple(_assignments(parts))


def _add_tensor(parts: dict[_Key, _Part], info: ModelInfo, tensor: TensorInfo, choices: Choices) -> None:
    part = info.part(tensor.name)
    quantizable = part.role in QUANTIZABLE
    entry = parts[part.role, part.layer if quantizable else None]
    # Only where a plan may decide does it matter which projection a tensor belongs to.
    projection = part.projection if part.role in ASSIGNABLE else ""
    entry.choices.setdefault(projection, choices.of(part))
    sums = entry.projections[projection]
    sums.modules += 0 if quantizable else 1
    sums.parameters += tensor.parameters
    sums.source_bytes += tensor.bytes
    sums.planned_bytes += tensor.bytes


def _assignments(parts: dict[_Key, _Part]) -> Iterator[Assignment]:
    order = list(Role)
    for (role, layer), entry in sorted(
        parts.items(), key=lambda item: (order.index(item[0][0]), -1 if item[0][1] is None else item[0][1])
    ):
        alike: dict[Choice, list[str]] = defaultdict(list)
        for projection, choice in entry.choices.items():
            alike[choice].append(projection)
        for choice, projections in alike.items():
            sums = _Sums()
            for projection in projections:
                sums.add(entry.projections[projection])
            yield Assignment(
                role=role.value,
                layer=layer,
                projections=() if len(alike) == 1 else tuple(sorted(projections)),
                format=choice.format.name if choice.format else SOURCE_DTYPE,
                reason=choice.reason,
                source=choice.source,
                modules=sums.modules,
                parameters=sums.parameters,
                source_bytes=sums.source_bytes,
                planned_bytes=sums.planned_bytes,
            )


def stored_bytes(family: Family, linear: LinearInfo, format: Format, choices: Choices) -> int:
    """Bytes on disk of one quantized matrix, all of its scales included.

    A ``pre_quant_scale`` is written for every matrix, except where the norm before it feeds nothing else and
    absorbs it.
    """
    size = format.stored_bytes(linear.out_features, linear.in_features, source_dtype=linear.dtype)
    if family.fuses_experts and linear.part.expert is not None and not _holds_scalars(family, linear):
        size -= sum(
            DTYPE_BYTES[item.dtype] for item in format.stored if item.required and item.shape(128, 128) == ()
        )
    if format.has_pre_quant_scale and not is_folded(family, linear, choices):
        size += linear.in_features * DTYPE_BYTES[linear.dtype]
    return size


def _holds_scalars(family: Family, linear: LinearInfo) -> bool:
    """Fused experts store one scalar per layer and tensor: counted with expert 0, for gate and up once."""
    return linear.part.expert == 0 and linear.part.projection != family.gate_up_down[1]


def is_folded(family: Family, linear: LinearInfo, choices: Choices) -> bool:
    """True when a norm of the same layer feeds this matrix and others of the same format only: it takes their scale."""
    inside = re.split(family.layer_pattern, linear.name)[-1]
    consumers = next((names for _, names in family.norm_folds if inside in names), ())
    keys = [(linear.part.role, linear.part.layer, name.rpartition(".")[2]) for name in consumers]
    formats = {choices.by_part[key].format for key in keys if key in choices.by_part}
    return bool(consumers) and formats == {choices.format_of(linear)}
