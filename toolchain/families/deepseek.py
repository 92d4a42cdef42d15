"""DeepSeek V2 and V3 (R1 is a V3): MLA attention, lead dense layers, shared experts.

Tensors of multi-token prediction live in layers ``num_hidden_layers`` and up; ``ModelInfo.part`` gives them
the role OTHER, because the number of layers is the model's and not the family's.
"""

from __future__ import annotations

from toolchain.core.roles import Role
from toolchain.families.base import NORM_ROLES, Family

DEEPSEEK = Family(
    name="deepseek",
    model_types=("deepseek_v2", "deepseek_v3"),
    roles=(
        *NORM_ROLES,
        (r"\.mlp\.gate(\.e_score_correction_bias)?$", Role.ROUTER),
        (r"\.mlp\.experts\.", Role.ROUTED_EXPERT),
        (r"\.mlp\.shared_experts\.", Role.SHARED_EXPERT),
        (r"\.mlp\.(gate|up|down)_proj$", Role.DENSE_MLP),
        (r"\.self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)$", Role.ATTENTION),
    ),
    num_experts_key="n_routed_experts",
    moe_intermediate_key="moe_intermediate_size",
    fused_groups=(("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj")),
    norm_folds=(
        # V2-Lite has no q_lora_rank: it stores one q_proj where the others store q_a_proj and q_b_proj.
        ("input_layernorm", ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
        ("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
        ("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
)
