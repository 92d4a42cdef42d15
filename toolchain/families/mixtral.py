"""Mixtral: ``block_sparse_moe.experts.N.w1/w3/w2`` (gate, up, down), router ``block_sparse_moe.gate``."""

from __future__ import annotations

from toolchain.core.roles import Role
from toolchain.families.base import NORM_ROLES, Family

SPARSE_MOE_ROLES: tuple[tuple[str, Role], ...] = (
    *NORM_ROLES,
    (r"\.block_sparse_moe\.(gate|e_score_correction_bias)$", Role.ROUTER),
    (r"\.block_sparse_moe\.experts\.", Role.ROUTED_EXPERT),
    (r"\.self_attn\.[qkvo]_proj$", Role.ATTENTION),
)
"""Shared with MiniMax, which took Mixtral's names."""

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    roles=SPARSE_MOE_ROLES,
    num_experts_key="num_local_experts",
    gate_up_down=("w1", "w3", "w2"),
    module_renames=((".mlp.", ".block_sparse_moe."),),
)
