"""Qwen3-MoE: per-expert gate/up/down, router ``mlp.gate``, optional dense layers, q/k norms."""

from __future__ import annotations

from toolchain.core.roles import Role
from toolchain.families.base import NORM_ROLES, Family

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    roles=(
        *NORM_ROLES,
        (r"\.mlp\.gate$", Role.ROUTER),
        (r"\.mlp\.experts\.", Role.ROUTED_EXPERT),
        (r"\.mlp\.(gate|up|down)_proj$", Role.DENSE_MLP),
        (r"\.self_attn\.[qkvo]_proj$", Role.ATTENTION),
    ),
    num_experts_key="num_experts",
    moe_intermediate_key="moe_intermediate_size",
)
