"""GLM-4.5/4.6 MoE: DeepSeek's expert names with grouped-query attention; one MTP layer after the last."""

from __future__ import annotations

from toolchain.core.roles import Role
from toolchain.families.base import NORM_ROLES, Family

GLM4_MOE = Family(
    name="glm4_moe",
    model_types=("glm4_moe",),
    roles=(
        *NORM_ROLES,
        (r"\.mlp\.gate(\.e_score_correction_bias)?$", Role.ROUTER),
        (r"\.mlp\.experts\.", Role.ROUTED_EXPERT),
        (r"\.mlp\.shared_experts\.", Role.SHARED_EXPERT),
        (r"\.mlp\.(gate|up|down)_proj$", Role.DENSE_MLP),
        (r"\.self_attn\.[qkvo]_proj$", Role.ATTENTION),
    ),
    num_experts_key="n_routed_experts",
    moe_intermediate_key="moe_intermediate_size",
)
