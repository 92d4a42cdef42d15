"""ModelInfo: everything that planning needs to know about a MODEL, read without loading a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from toolchain.core.roles import Role
from toolchain.families.base import Family, Part
from toolchain.formats.base import DTYPE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    name: str
    """Checkpoint name, such as ``model.layers.0.mlp.experts.3.gate_proj.weight``."""
    shape: tuple[int, ...]
    dtype: str
    """Safetensors dtype name (``BF16``, ``F8_E4M3``...)."""
    file: str = ""
    """Shard that holds it, relative to the model directory; empty when planned from config.json alone."""

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.parameters * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class LinearInfo:
    """One matrix of a matmul: what a format is assigned to. Fused 3-D experts count one per expert."""

    name: str
    """Checkpoint module name without ``.weight``."""
    part: Part
    out_features: int
    in_features: int
    dtype: str

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What KV-cache arithmetic needs."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_elements_per_token_per_layer: int
    """2 * num_kv_heads * head_dim for MHA/GQA; kv_lora_rank + qk_rope_head_dim for MLA."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the stored numbers of a quantized source become values (``prequantized.py``)."""

    method: str
    block: tuple[int, int]
    """Rows and columns of [out, in] that share a scale."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    source: str
    """What the user typed: a directory or a hub id."""
    path: str | None
    """Local directory (the hub snapshot, once resolved); None when there is only a config object."""
    architecture: str
    model_type: str
    family: Family
    config: dict[str, Any] = field(repr=False)
    """config.json; for multimodal wrappers the text config, with ``architectures`` of the wrapper."""
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    linears: tuple[LinearInfo, ...] = field(repr=False)
    attention: Attention
    num_experts: int
    """0 for a dense model."""
    num_experts_per_tok: int
    dtype: str
    """The dtype of most parameters, as safetensors names it."""
    has_weights: bool
    has_tokenizer: bool
    chat_template: bool
    tied_embeddings: bool
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    scheme: Scheme | None = None
    """How a quantized source is dequantized; ``tensors`` and ``linears`` then describe the BF16 model. None: plain."""
    stored_bytes: int = 0
    """Bytes of tensors in the files of a quantized source; 0 for a plain one."""

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def num_hidden_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def quantization(self) -> dict[str, Any] | None:
        """``quantization_config`` of a source that is already quantized."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) and found else None

    def part(self, name: str) -> Part:
        """Like ``family.classify``; layers past ``num_hidden_layers`` (multi-token prediction) are OTHER."""
        found = self._parts.get(name)
        if found is None:
            found = self._parts[name] = decoder_part(self.family, name, self.num_hidden_layers)
        return found

    @cached_property
    def _parts(self) -> dict[str, Part]:
        return {}

    @cached_property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @cached_property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        """Bytes of tensors in the files."""
        return self.stored_bytes or self.bytes

    def by_role(self, role: Role) -> Iterator[LinearInfo]:
        return (linear for linear in self.linears if linear.part.role is role)


def decoder_part(family: Family, name: str, num_hidden_layers: int) -> Part:
    """What ``name`` is in a decoder of ``num_hidden_layers`` layers."""
    part = family.classify(name)
    if part.layer is not None and part.layer >= num_hidden_layers:
        return replace(part, role=Role.OTHER, expert=None)
    return part
