"""What a budget of bits counts: the whole checkpoint, or what one token reads of it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.core.roles import Role
from toolchain.models.types import ModelInfo
from toolchain.plan.types import Plan

COSTS = ("checkpoint", "active_moe")
"""``active_moe`` is the cost model of that name in ModelOpt's ``auto_quantize``: routed experts count by the share of
them that a token uses. The budget is then one of memory traffic, not of storage."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Weights of bytes and of parameters alike, as whole numbers: sums stay exact."""

    routed: int
    rest: int
    other: int
    """Of what is no part of the decoder."""
    parameters: int
    """Of the model, weighted."""

    def weight(self, role: Role) -> int:
        return {Role.ROUTED_EXPERT: self.routed, Role.OTHER: self.other}.get(role, self.rest)

    def of_plan(self, plan: Plan) -> int:
        """Weighted bytes of the checkpoint."""
        return sum(self.weight(Role(item.role)) * item.planned_bytes for item in plan.assignments)

    def bits(self, weighted_bytes: int) -> float:
        """Per parameter."""
        return weighted_bytes * 8 / self.parameters


def cost_of(info: ModelInfo, kind: str) -> Cost:
    routed, rest, other = 1, 1, 1
    if kind == "active_moe":
        routed, rest, other = (info.num_experts_per_tok, info.num_experts, 0) if info.is_moe else (1, 1, 0)
    weights = {Role.ROUTED_EXPERT: routed, Role.OTHER: other}
    counted = sum(weights.get(info.part(item.name).role, rest) * item.parameters for item in info.tensors)
    return Cost(routed=routed, rest=rest, other=other, parameters=counted)
