"""The models that are judged: four families, small enough to train on two cores, wide enough for block formats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 2048
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}
"""Every width that is a matrix's input is a multiple of 128: the largest group of the formats compared."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    name: str
    prefix: str
    """Of transformers' classes ``<prefix>Config`` and ``<prefix>ForCausalLM``."""
    settings: dict[str, Any] = field(repr=False)
    moe: bool = True
    aux_loss: float = 0.02
    """Weight of the load-balancing loss; 0 where the family has none."""
    bias_rate: float = 0.0
    """Step of the router's correction bias per optimiser step (DeepSeek-V3, arXiv:2412.19437, section 2.1.2)."""
    peak_rate: float = 4e-3
    """Peak learning rate of AdamW."""
    steps: int = 1000


ARCHITECTURES = (
    Architecture(
        name="qwen3_moe",
        prefix="Qwen3Moe",
        settings={
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
    ),
    Architecture(
        name="mixtral",
        prefix="Mixtral",
        settings={
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 512,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    Architecture(
        name="deepseek_v3",
        prefix="DeepseekV3",
        settings={
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 128,
            "kv_lora_rank": 128,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        aux_loss=0.0,
        bias_rate=0.01,
    ),
    Architecture(
        name="llama",
        prefix="Llama",
        settings={"num_hidden_layers": 6, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 768},
        moe=False,
        aux_loss=0.0,
    ),
)
BY_NAME = {item.name: item for item in ARCHITECTURES}
