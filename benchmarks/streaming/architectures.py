"""The synthetic models: names, shapes and dtypes of every tensor, as the releases have them, with fewer of them.

``qwen3_moe``: Qwen3-30B-A3B (hidden 2048, experts of 768, 32 heads of 128, 4 of keys) with 32 of its 128 experts and a
vocabulary of 16384, BF16. ``deepseek_v3``: DeepSeek-V3 with every width halved (hidden 3584, experts of 1024, 64 heads,
ranks 768 and 256), 24 of its 256 experts, one of its three dense layers; blocks of 128 x 128 E4M3 with
``weight_scale_inv``, router and embeddings not. The number of layers follows from the size on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

DTYPE_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
VOCABULARY = 16384
FP8_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Tensor:
    name: str
    dtype: str
    """Safetensors name."""
    shape: tuple[int, ...]
    kind: str = "weight"
    """``weight`` (normal, standard deviation 0.02), ``norm`` (ones), ``scale`` (of FP8 blocks) or ``bias``."""

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    name: str
    config_class: str
    """In transformers."""
    settings: dict[str, Any]
    layer: Callable[[int], Iterator[Tensor]]
    quantization: dict[str, Any] | None = None
    """``quantization_config`` of config.json."""

    def tensors(self, layers: int) -> Iterator[Tensor]:
        hidden = self.settings["hidden_size"]
        yield _bf16("model.embed_tokens.weight", VOCABULARY, hidden)
        for layer in range(layers):
            yield from self.layer(layer)
        yield _norm("model.norm.weight", hidden)
        yield _bf16("lm_head.weight", VOCABULARY, hidden)

    def layer_bytes(self) -> int:
        """Of a layer with experts, in BF16: what calibration computes with."""
        return sum(2 * prod(tensor.shape) for tensor in self.layer(1))

    def layers_of(self, size: int) -> int:
        """Layers with which the weights come nearest to ``size`` bytes; two at least."""
        outside = sum(tensor.bytes for tensor in self.tensors(0))
        first, other = (sum(tensor.bytes for tensor in self.layer(index)) for index in (0, 1))
        return max(2, 1 + round((size - outside - first) / other))


def _bf16(name: str, *shape: int) -> Tensor:
    return Tensor(name=name, dtype="BF16", shape=shape)


def _norm(name: str, size: int) -> Tensor:
    return Tensor(name=name, dtype="BF16", shape=(size,), kind="norm")


def _fp8(module: str, rows: int, columns: int) -> Iterator[Tensor]:
    yield Tensor(name=f"{module}.weight", dtype="F8_E4M3", shape=(rows, columns))
    blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    yield Tensor(name=f"{module}.weight_scale_inv", dtype="F32", shape=blocks, kind="scale")


def _qwen3_layer(layer: int) -> Iterator[Tensor]:
    hidden, width, experts, head = 2048, 768, 32, 128
    at = f"model.layers.{layer}"
    yield _norm(f"{at}.input_layernorm.weight", hidden)
    for expert in range(experts):
        for name, shape in (("down", (hidden, width)), ("gate", (width, hidden)), ("up", (width, hidden))):
            yield _bf16(f"{at}.mlp.experts.{expert}.{name}_proj.weight", *shape)
    yield _bf16(f"{at}.mlp.gate.weight", experts, hidden)
    yield _norm(f"{at}.post_attention_layernorm.weight", hidden)
    yield _norm(f"{at}.self_attn.k_norm.weight", head)
    yield _bf16(f"{at}.self_attn.k_proj.weight", 4 * head, hidden)
    yield _bf16(f"{at}.self_attn.o_proj.weight", hidden, 32 * head)
    yield _norm(f"{at}.self_attn.q_norm.weight", head)
    yield _bf16(f"{at}.self_attn.q_proj.weight", 32 * head, hidden)
    yield _bf16(f"{at}.self_attn.v_proj.weight", 4 * head, hidden)


def _deepseek_layer(layer: int) -> Iterator[Tensor]:
    hidden, dense, width, experts = 3584, 9216, 1024, 24
    heads, q_rank, kv_rank, nope, rope, value = 64, 768, 256, 128, 64, 128
    at = f"model.layers.{layer}"
    yield _norm(f"{at}.input_layernorm.weight", hidden)
    if layer == 0:
        yield from _mlp(f"{at}.mlp", hidden, dense)
    else:
        for expert in range(experts):
            yield from _mlp(f"{at}.mlp.experts.{expert}", hidden, width)
        yield Tensor(
            name=f"{at}.mlp.gate.e_score_correction_bias", dtype="F32", shape=(experts,), kind="bias"
        )
        yield _bf16(f"{at}.mlp.gate.weight", experts, hidden)
        yield from _mlp(f"{at}.mlp.shared_experts", hidden, width)
    yield _norm(f"{at}.post_attention_layernorm.weight", hidden)
    yield _norm(f"{at}.self_attn.kv_a_layernorm.weight", kv_rank)
    yield from _fp8(f"{at}.self_attn.kv_a_proj_with_mqa", kv_rank + rope, hidden)
    yield from _fp8(f"{at}.self_attn.kv_b_proj", heads * (nope + value), kv_rank)
    yield from _fp8(f"{at}.self_attn.o_proj", hidden, heads * value)
    yield _norm(f"{at}.self_attn.q_a_layernorm.weight", q_rank)
    yield from _fp8(f"{at}.self_attn.q_a_proj", q_rank, hidden)
    yield from _fp8(f"{at}.self_attn.q_b_proj", heads * (nope + rope), q_rank)


def _mlp(module: str, hidden: int, width: int) -> Iterator[Tensor]:
    yield from _fp8(f"{module}.down_proj", hidden, width)
    yield from _fp8(f"{module}.gate_proj", width, hidden)
    yield from _fp8(f"{module}.up_proj", width, hidden)


ARCHITECTURES = (
    Architecture(
        name="qwen3_moe",
        config_class="Qwen3MoeConfig",
        settings=dict(
            hidden_size=2048, moe_intermediate_size=768, intermediate_size=6144, num_experts=32,
            num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4, head_dim=128, norm_topk_prob=True,
        ),
        layer=_qwen3_layer,
    ),
    Architecture(
        name="deepseek_v3",
        config_class="DeepseekV3Config",
        settings=dict(
            hidden_size=3584, moe_intermediate_size=1024, intermediate_size=9216, n_routed_experts=24,
            n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=1, n_group=4, topk_group=2,
            num_attention_heads=64, num_key_value_heads=64, q_lora_rank=768, kv_lora_rank=256, qk_nope_head_dim=128,
            qk_rope_head_dim=64, v_head_dim=128,
        ),
        layer=_deepseek_layer,
        quantization={
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        },
    ),
)  # fmt: skip
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
SIZES_GB = (1, 4, 16)


def model_name(architecture: str, size_gb: int) -> str:
    return f"{architecture}-{size_gb}gb"
