"""The tensors of one rank of a decoder, under the names of TensorRT-LLM's module tree.

Names: ``tensorrt_llm/models/llama/convert.py``, ``models/qwen/convert.py`` and ``layers/moe.py`` of 1.2. A rank
numbers its layers from 0. ``mlp.fc`` is the matrix under the activation (gate_proj of the hub), ``mlp.gate`` the one
that it is multiplied with (up_proj); experts and shared experts hold both in ``fc``, up before gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolchain.build.tensorrt.linears import (
    Cut,
    Member,
    Source,
    join,
    padded,
    part_of_rows,
    rank_linear,
)
from toolchain.build.tensorrt.mapping import WHOLE, Rank, Share
from toolchain.core.errors import ToolchainError
from toolchain.families import Family
from toolchain.families.lookup import EXPERT_COUNT_KEYS
from toolchain.formats.base import Format
from toolchain.models.config import need
from toolchain.models.types import Attention
from toolchain.targets.tensorrt import LegacyModel

if TYPE_CHECKING:
    import torch

Piece = tuple[str, int, "torch.Tensor"]
"""(name, index of its first row, rows). Pieces of one name are in order and together the tensor."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A model whose Linears have ``format_of(checkpoint module)``; None for those that keep their dtype."""

    model: LegacyModel
    family: Family
    config: dict[str, Any] = field(repr=False)
    attention: Attention
    format_of: Callable[[str], Format | None] = field(repr=False)
    kv_algo: str | None = None
    """``kv_cache_quant_algo``: FP8 or None."""

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer; the releases of transformers call them by different keys."""
        return need(self.config, self.family.num_experts_key or "", *EXPERT_COUNT_KEYS)

    def pieces(self, source: Source, rank: Rank) -> Iterator[Piece]:
        """Everything in the file of ``rank``."""
        if rank.is_first:
            yield from self._vocabulary(
                source, rank, "model.embed_tokens.weight", "transformer.vocab_embedding.weight"
            )
        for place, layer in enumerate(rank.layers(self.num_layers)):
            yield from self._layer(source, rank, f"model.layers.{layer}", f"transformer.layers.{place}")
        if rank.is_last:
            yield "transformer.ln_f.weight", 0, source.get("model.norm.weight").to(source.dtype)
            tied = not source.has("lm_head.weight")
            head = "model.embed_tokens.weight" if tied else "lm_head.weight"
            yield from self._vocabulary(source, rank, head, "lm_head.weight")

    def _vocabulary(self, source: Source, rank: Rank, stored: str, name: str) -> Iterator[Piece]:
        """Embeddings are cut along the vocabulary, too (``use_parallel_embedding``), as ModelOpt's exporter does."""
        table = padded(source.get(stored).to(source.dtype), rank.tp.of)
        yield name, 0, part_of_rows(table, rank.tp)

    def _layer(self, source: Source, rank: Rank, stored: str, name: str) -> Iterator[Piece]:
        norms = {
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_layernorm",
        }
        if self.model.qk_norm:
            norms |= {
                "self_attn.q_norm": "attention.q_layernorm",
                "self_attn.k_norm": "attention.k_layernorm",
            }
        for old, new in norms.items():
            yield f"{name}.{new}.weight", 0, source.get(f"{stored}.{old}.weight").to(source.dtype)
        yield from self._attention(source, rank, f"{stored}.self_attn", f"{name}.attention")
        if self.model.moe_parent:
            yield from self._experts(source, rank, f"{stored}.{self.model.moe_parent}", f"{name}.mlp")
        else:
            yield from self._mlp(source, rank, f"{stored}.mlp", f"{name}.mlp")

    def _attention(self, source: Source, rank: Rank, stored: str, name: str) -> Iterator[Piece]:
        heads, size = self.attention.num_kv_heads, rank.tp.of
        # Fewer key heads than ranks: each is held by several ranks (``dup_kv_weight`` in models/convert_utils.py).
        keys = rank.tp if heads >= size else Share(index=rank.tp.index // (size // heads), of=heads)
        members = [
            Member(module=f"{stored}.q_proj", share=rank.tp),
            Member(module=f"{stored}.k_proj", share=keys),
            Member(module=f"{stored}.v_proj", share=keys),
        ]
        yield from self._linear(source, members, f"{name}.qkv", "column", rank.tp)
        yield from self._linear(source, [Member(module=f"{stored}.o_proj")], f"{name}.dense", "row", rank.tp)
        if self.kv_algo:
            yield f"{name}.kv_cache_scaling_factor", 0, self._kv_scale(source, stored)

    def _kv_scale(self, source: Source, stored: str) -> torch.Tensor:
        """[1] float32: the larger of the two, for the plugin has one (``process_kv_scaling_factor``); 1 where the
        checkpoint has none (a cache that is cast without scales)."""
        import torch

        names = [f"{stored}.k_proj.k_scale", f"{stored}.v_proj.v_scale"]
        scales = [source.get(name).float().reshape(1) for name in names if source.has(name)]
        if not scales:
            return torch.ones(1, device=source.get(f"{stored}.o_proj.weight").device)
        return join(scales).amax().reshape(1)

    def _mlp(self, source: Source, rank: Rank, stored: str, name: str) -> Iterator[Piece]:
        for old, new in (("gate_proj", "fc"), ("up_proj", "gate")):
            members = [Member(module=f"{stored}.{old}", share=rank.tp)]
            yield from self._linear(source, members, f"{name}.{new}", "column", rank.tp)
        yield from self._linear(
            source, [Member(module=f"{stored}.down_proj")], f"{name}.proj", "row", rank.tp
        )

    def _experts(self, source: Source, rank: Rank, stored: str, name: str) -> Iterator[Piece]:
        yield f"{name}.router.weight", 0, source.get(f"{stored}.gate.weight").float()
        gate, up, down = self.family.gate_up_down
        count = self.num_experts
        experts = f"{stored}.experts"
        yield from self._stack(source, rank, experts, count, (up, gate), f"{name}.fc", "column")
        yield from self._stack(source, rank, experts, count, (down,), f"{name}.proj", "row")
        if self.model.qwen_type == "qwen2_moe":
            yield from self._shared_expert(source, rank, stored, name)

    def _shared_expert(self, source: Source, rank: Rank, stored: str, name: str) -> Iterator[Piece]:
        expert = f"{stored}.shared_expert"
        members = [Member(module=f"{expert}.{part}", share=rank.tp) for part in ("up_proj", "gate_proj")]
        yield from self._linear(source, members, f"{name}.shared_expert.fc", "column", rank.tp)
        down = [Member(module=f"{expert}.down_proj")]
        yield from self._linear(source, down, f"{name}.shared_expert.proj", "row", rank.tp)
        gate = source.get(f"{stored}.shared_expert_gate.weight").to(source.dtype)
        yield f"{name}.shared_expert_gate.weight", 0, gate

    def _stack(
        self,
        source: Source,
        rank: Rank,
        stored: str,
        count: int,
        fused: tuple[str, ...],
        name: str,
        cut: Cut,
    ) -> Iterator[Piece]:
        """The rank's experts, one at a time: [1, out, in] each, and one input scale for all of the model's."""
        for place, expert in enumerate(rank.experts(count)):
            members = [
                Member(module=f"{stored}.{expert}.{part}", share=rank.moe_tp if cut == "column" else WHOLE)
                for part in fused
            ]
            format = self.format_of(members[0].module)
            for suffix, tensor in rank_linear(source, members, format, cut, rank.moe_tp):
                if suffix == "activation_scaling_factor":
                    continue
                yield f"{name}.{suffix}", place, tensor.unsqueeze(0)
        scales = [f"{stored}.{expert}.{part}.input_scale" for expert in range(count) for part in fused]
        if self.format_of(f"{stored}.0.{fused[0]}") is not None:
            largest = join([source.get(scale).float().reshape(1) for scale in scales]).amax()
            yield f"{name}.activation_scaling_factor", 0, largest.reshape(1)

    def _linear(
        self, source: Source, members: list[Member], name: str, cut: Cut, share: Share
    ) -> Iterator[Piece]:
        formats = {self.format_of(member.module) for member in members}
        if len(formats) > 1:
            raise ToolchainError(
                f"{members[0].module} and what TensorRT fuses with it are in several formats", code="TC-421"
            )
        (format,) = formats
        for suffix, tensor in rank_linear(source, members, format, cut, share):
            yield f"{name}.{suffix}", 0, tensor
