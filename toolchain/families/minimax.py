"""MiniMax Text-01 and M2: Mixtral's names for the experts; Text-01 has lightning attention in most layers.

A lightning layer stores ``self_attn.qkv_proj``, ``out_proj`` and ``output_gate``. The gate is left alone as
every gate is; the other two are attention. In Text-01 the normalised activations are also the residual
(``residual = input_layernorm(x)``, transformers ``modeling_minimax.py``), so no scale may be folded into a
norm.
"""

from __future__ import annotations

from toolchain.core.roles import Role
from toolchain.families.base import Family
from toolchain.families.mixtral import SPARSE_MOE_ROLES

MINIMAX = Family(
    name="minimax",
    model_types=("minimax", "minimax_m2"),
    roles=(
        *SPARSE_MOE_ROLES,
        (r"\.self_attn\.output_gate$", Role.ROUTER),
        (r"\.self_attn\.(qkv|out)_proj$", Role.ATTENTION),
    ),
    num_experts_key="num_local_experts",
    gate_up_down=("w1", "w3", "w2"),
    norm_folds=(),
    module_renames=((".mlp.", ".block_sparse_moe."),),
)
