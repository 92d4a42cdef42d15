"""gpt-oss: 3-D experts, input dimension first, gate and up interleaved, with biases; attention sinks.

Published in MXFP4: ``gate_up_proj_blocks`` [E, 2*I, H/32, 16] and ``_scales`` [E, 2*I, H/32], output dimension first.
"""

from __future__ import annotations

from toolchain.core.roles import Role
from toolchain.families.base import FUSED_FORMATS, FUSED_REASON, NORM_ROLES, Family

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
    interleaved=True,
    formats=("mxfp4", *FUSED_FORMATS),
    formats_reason=f"{FUSED_REASON}; gpt-oss itself is published in MXFP4",
    target_formats=(
        (
            "trtllm",
            ("mxfp4",),
            "TensorRT-LLM's loader for gpt-oss reads experts in BF16 or in the published MXFP4 layout only "
            "(_torch/models/modeling_gpt_oss.py)",
        ),
    ),
)
