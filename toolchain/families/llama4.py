"""Llama 4 text: ``feed_forward`` instead of ``mlp``; experts as 3-D tensors, input dimension first; one
shared expert.

Every release on the hub is the multimodal wrapper, which puts ``language_model.`` before every decoder name; patterns
are not anchored, so both match.
"""

from __future__ import annotations

from toolchain.core.roles import Role
from toolchain.families.base import FUSED_FORMATS, FUSED_REASON, NORM_ROLES, Family

LLAMA4 = Family(
    name="llama4",
    model_types=("llama4_text", "llama4"),
    roles=(
        *NORM_ROLES,
        (r"\.feed_forward\.router$", Role.ROUTER),
        (r"\.feed_forward\.experts\.", Role.ROUTED_EXPERT),
        (r"\.feed_forward\.shared_expert\.", Role.SHARED_EXPERT),
        (r"\.feed_forward\.(gate|up|down)_proj$", Role.DENSE_MLP),
        (r"\.self_attn\.[qkvo]_proj$", Role.ATTENTION),
    ),
    num_experts_key="num_local_experts",
    expert_storage="fused_in_out",
    norm_folds=(
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("feed_forward.gate_proj", "feed_forward.up_proj")),
    ),
    wrapper_prefix="language_model.",
    formats=FUSED_FORMATS,
    formats_reason=FUSED_REASON,
)
