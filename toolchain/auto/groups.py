"""Layer groups: the smallest parts that runtimes need in one format. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from toolchain.core.roles import ASSIGNABLE, QUANTIZABLE, Role
from toolchain.formats import get_format
from toolchain.formats.base import DTYPE_BYTES, Format
from toolchain.models.types import LinearInfo, ModelInfo
from toolchain.plan.assign import stored_bytes
from toolchain.plan.choices import Choices, Override, choose, overrides_of
from toolchain.plan.policy import CUSTOM
from toolchain.plan.types import Plan


@dataclass(frozen=True, kw_only=True)
class Group:
    """q/k/v of one attention, gate/up of one MLP, all routed experts of one layer, or one matrix that is run alone."""

    role: Role
    layer: int | None
    """None for lm_head."""
    projections: tuple[str, ...]
    """Empty: all of this role in this layer."""
    linears: tuple[LinearInfo, ...]

    @property
    def name(self) -> str:
        """``3.attention.q_proj+k_proj+v_proj``, ``3.routed_expert``, ``lm_head``."""
        layer = [] if self.layer is None else [str(self.layer)]
        return ".".join([*layer, self.role.value, *filter(None, ["+".join(self.projections)])])

    @property
    def modules(self) -> tuple[str, ...]:
        """Checkpoint names of its matrices."""
        return tuple(linear.name for linear in self.linears)

    @property
    def parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears)

    @property
    def source_bytes(self) -> int:
        return sum(linear.parameters * DTYPE_BYTES[linear.dtype] for linear in self.linears)

    def fits(self, format: Format) -> bool:
        """Whether every matrix has whole groups of the format."""
        return not any(
            linear.in_features % format.in_multiple or linear.out_features % format.out_multiple
            for linear in self.linears
        )

    def stored_bytes(self, info: ModelInfo, format: Format, choices: Choices) -> int:
        """Bytes on disk, scales included; ``choices`` give this group ``format`` (what a norm takes depends on it)."""
        return sum(stored_bytes(info.family, linear, format, choices) for linear in self.linears)

    def override(self, format_name: str, *, source: str, reason: str = "") -> Override:
        return Override(
            role=self.role,
            layer=self.layer,
            projections=self.projections,
            format=format_name,
            source=source,
            reason=reason,
        )


def find_groups(info: ModelInfo, linears: Iterable[LinearInfo]) -> tuple[Group, ...]:
    """Groups of ``linears`` in the order of the model; parts that no plan may quantize are left out."""
    members: dict[tuple[Role, int | None, tuple[str, ...]], list[LinearInfo]] = {}
    for linear in linears:
        part = linear.part
        if part.role not in ASSIGNABLE:
            continue
        siblings = () if part.role is Role.ROUTED_EXPERT else info.family.fused_siblings(part.projection)
        layer = part.layer if part.role in QUANTIZABLE else None
        members.setdefault((part.role, layer, siblings), []).append(linear)
    order = list(Role)
    return tuple(
        Group(
            role=role,
            layer=layer,
            projections=()
            if role in (Role.ROUTED_EXPERT, Role.LM_HEAD)
            else tuple(name for name in siblings if name in {item.part.projection for item in found}),
            linears=tuple(found),
        )
        for (role, layer, siblings), found in sorted(
            members.items(),
            key=lambda item: (
                info.num_hidden_layers if item[0][1] is None else item[0][1],
                order.index(item[0][0]),
            ),
        )
    )


def choices_of(info: ModelInfo, plan: Plan) -> Choices:
    """The decisions of ``plan``, matrix by matrix."""
    return choose(info, get_format(plan.format), CUSTOM, overrides=overrides_of(plan))


def quantized_groups(info: ModelInfo, plan: Plan) -> tuple[Group, ...]:
    """Groups of the matrices that ``plan`` quantizes."""
    return find_groups(info, (linear for linear, _ in choices_of(info, plan).quantized(info)))
