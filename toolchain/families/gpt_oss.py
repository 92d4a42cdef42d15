"""gpt-oss: 3-D experts, input dimension first, gate and up interleaved, with biases; attention sinks."""

from __future__ import annotations

from toolchain.core.roles import Role
from toolchain.families.base import FUSED_EXPERTS_REFUSED, NORM_ROLES, Family

GPT_OSS = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    roles=(
        *NORM_ROLES,
        (r"\.mlp\.router$", Role.ROUTER),
        (r"\.mlp\.experts\.", Role.ROUTED_EXPERT),
        (r"\.self_attn\.[qkvo]_proj$", Role.ATTENTION),
    ),
    num_experts_key="num_local_experts",
    expert_storage="fused_in_out",
    refuses=FUSED_EXPERTS_REFUSED,
)
