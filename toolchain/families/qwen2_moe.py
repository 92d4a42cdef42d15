"""Qwen2-MoE and Qwen1.5-MoE: one shared expert with a gate of its own; q/k/v have biases."""

from __future__ import annotations

from toolchain.core.roles import Role
from toolchain.families.base import NORM_ROLES, Family

QWEN2_MOE = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    roles=(
        *NORM_ROLES,
        (r"\.mlp\.(gate|shared_expert_gate)$", Role.ROUTER),
        (r"\.mlp\.experts\.", Role.ROUTED_EXPERT),
        (r"\.mlp\.shared_expert\.", Role.SHARED_EXPERT),
        (r"\.mlp\.(gate|up|down)_proj$", Role.DENSE_MLP),
        (r"\.self_attn\.[qkvo]_proj$", Role.ATTENTION),
    ),
    num_experts_key="num_experts",
    moe_intermediate_key="moe_intermediate_size",
)
