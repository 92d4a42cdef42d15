"""A Family says how one model family names its parts. Declarations and name arithmetic only: no torch here.

All patterns speak *checkpoint* names: the tensor names of the safetensors files on the hub, without the final
``.weight`` or ``.bias``. ``to_checkpoint`` and ``to_module`` translate to the module paths of transformers 5,
where those differ (Mixtral stores ``block_sparse_moe.experts.3.w1`` and runs ``mlp.experts``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from toolchain.core.roles import Role
from toolchain.families import fused

ExpertStorage = Literal["per_expert", "fused_in_out"]
"""How the source checkpoint stores routed experts.

``per_expert``: one [out, in] matrix per expert and projection. ``fused_in_out``: 3-D ``gate_up_proj`` [E, in,
2*I] and ``down_proj`` [E, I, in], input dimension first (gpt-oss, Llama 4).
"""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a checkpoint name is: role, decoder layer, and for routed experts which expert and projection."""

    role: Role
    layer: int | None = None
    expert: int | None = None
    projection: str = ""
    """Last component of the module path, such as ``gate_proj``, ``w1``, ``q_proj``."""


@dataclass(frozen=True, kw_only=True)
class Family:
    name: str
    model_types: tuple[str, ...]
    """Values of ``model_type`` in config.json."""
    architectures: tuple[str, ...] = ()
    """Values of ``architectures[0]``, when they tell more than model_type."""
    roles: tuple[tuple[str, Role], ...]
    """(regular expression, role): the first that ``re.search`` finds in the checkpoint name wins."""
    num_experts_key: str | None = None
    """config.json key with the number of routed experts; None for a dense family."""
    moe_intermediate_key: str = "intermediate_size"
    """config.json key with the intermediate size of one routed expert."""
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Checkpoint names of one routed expert's projections."""
    expert_storage: ExpertStorage = "per_expert"
    interleaved: bool = False
    """Fused gate_up_proj alternates gate and up columns; False: all of gate, then all of up."""
    fused_groups: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    """Projections under one parent that runtimes fuse into one matmul: their scales must agree."""
    norm_folds: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    )
    """(norm, its only consumers) within a layer: AWQ folds their common pre_quant_scale into the norm."""
    module_renames: tuple[tuple[str, str], ...] = ()
    """(transformers 5 module path fragment, checkpoint fragment) pairs, applied as plain replacements."""
    wrapper_prefix: str = ""
    """What a multimodal wrapper's checkpoint puts before decoder names, where transformers' CausalLM has nothing."""
    layer_pattern: str = r"(?:^|\.)layers\.(\d+)\."
    expert_pattern: str = r"\.experts\.(\d+)\."
    formats: tuple[str, ...] | None = None
    """Formats that its experts can be stored in; None for every format."""
    formats_reason: str = ""
    """Why other formats are refused."""
    target_formats: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    """(target, formats of experts that its loader for this family reads, reason): less than ``formats``."""

    def __hash__(self) -> int:
        """By name: the generated one walks all fields, for each of a model's tensors."""
        return hash(self.name)

    @property
    def fuses_experts(self) -> bool:
        """True when the checkpoint stores all experts of a layer and projection in one tensor."""
        return self.expert_storage == "fused_in_out"

    def refusal(self, format_name: str, target: str = "") -> str:
        """Why its experts cannot be stored in a format, or not loaded by ``target``; empty when they can."""
        if self.formats is not None and format_name not in self.formats:
            return self.formats_reason
        for name, formats, reason in self.target_formats:
            if name == target and format_name not in formats:
                return reason
        return ""

    def split(self, tensor_name: str) -> tuple[str, str]:
        """Tensor name -> (module, suffix); a fused expert tensor counts as a module of its own (``fused.py``)."""
        found = fused.split_name(tensor_name) if self.fuses_experts else None
        if found is not None:
            return found
        module, _, suffix = tensor_name.rpartition(".")
        return module, suffix

    def join(self, module: str, suffix: str, format_name: str = "") -> str:
        """Inverse of ``split`` for a module that is stored in ``format_name``."""
        return fused.join_name(module, suffix, format_name) if self.is_fused(module) else f"{module}.{suffix}"

    def is_fused(self, module: str) -> bool:
        """True when ``module`` is one tensor with all experts of a layer."""
        return self.fuses_experts and fused.split_name(module) == (module, "weight")

    def members(self, module: str, experts: int) -> list[list[str]]:
        """Per expert, the names of the matrices that a fused module holds."""
        return fused.members(module, experts, self.gate_up_down)

    def classify(self, name: str) -> Part:
        """Role, layer, expert and projection of a checkpoint name (with or without .weight/.bias)."""
        return _classify(self, name)

    def to_checkpoint(self, module_path: str) -> str:
        """transformers 5 module path (after unfusing experts) -> checkpoint name.

        Suffixes stay as they are.
        """
        for module, stored in self.module_renames:
            module_path = module_path.replace(module, stored)
        return self._rename_projections(module_path, ("gate_proj", "up_proj", "down_proj"), self.gate_up_down)

    def to_module(self, checkpoint_name: str) -> str:
        """Checkpoint name -> transformers 5 module path (after unfusing experts).

        Suffixes stay as they are.
        """
        name = self._rename_projections(
            checkpoint_name, self.gate_up_down, ("gate_proj", "up_proj", "down_proj")
        )
        for module, stored in reversed(self.module_renames):
            name = name.replace(stored, module)
        return name.removeprefix(self.wrapper_prefix)

    def is_tower(self, checkpoint_name: str) -> bool:
        """True for parts of a vision or audio tower: stored and kept, but no part of the decoder."""
        return re.search(TOWERS, checkpoint_name) is not None

    def _rename_projections(self, name: str, old: tuple[str, ...], new: tuple[str, ...]) -> str:
        if not self.num_experts_key or not re.search(self.expert_pattern, name):
            return name
        renamed = dict(zip(old, new, strict=True))
        return ".".join(renamed.get(piece, piece) for piece in name.split("."))

    def fused_siblings(self, projection: str) -> tuple[str, ...]:
        """The projections that a runtime fuses with ``projection``, itself included."""
        groups = (*self.fused_groups, self.gate_up_down[:2])
        return next((group for group in groups if projection in group), (projection,))

    def shared_scales(self, checkpoint_name: str) -> tuple[str, tuple[str, ...]]:
        """(parent, projections) whose per-tensor scales are stored as one.

        Fused storage has one scalar for all experts of a layer, which is what TensorRT-LLM and ModelOpt read and write.
        """
        parent, _, projection = checkpoint_name.rpartition(".")
        if self.fuses_experts and self.classify(checkpoint_name).expert is not None:
            parent = parent.rpartition(".")[0]
        return parent, self.fused_siblings(projection)


@lru_cache(maxsize=1 << 18)
def _classify(family: Family, name: str) -> Part:
    base = re.sub(r"\.(weight|bias)$", "", name)
    role = next((role for pattern, role in family.roles if re.search(pattern, base)), Role.OTHER)
    layer = re.search(family.layer_pattern, base + ".")
    expert = re.search(family.expert_pattern, base + ".") if role is Role.ROUTED_EXPERT else None
    return Part(
        role=role,
        layer=int(layer.group(1)) if layer else None,
        expert=int(expert.group(1)) if expert else None,
        projection=base.rpartition(".")[2],
    )


TOWERS = r"(^|\.)(vision_model|vision_tower|visual|multi_modal_projector|mm_projector|audio_tower)\."

NORM_ROLES: tuple[tuple[str, Role], ...] = (
    # A vision or audio tower has a q_proj of its own: set it aside before any decoder pattern can match.
    (TOWERS, Role.OTHER),
    (r"norm\d?$", Role.NORM),
    (r"(embed_tokens|wte|word_embeddings)$", Role.EMBEDDING),
    (r"lm_head$", Role.LM_HEAD),
)
"""The start of every family's ``roles``: what all decoders share."""

FUSED_FORMATS = ("fp8", "nvfp4", "w4a16_nvfp4")
FUSED_REASON = (
    "its checkpoint stores the experts of a layer as one tensor with the input dimension first, and for that storage "
    "ModelOpt and the runtimes define FP8 and NVFP4 only: one scale for all experts, blocks along the input"
)
"""``formats`` and ``formats_reason`` of families with ``fused_in_out`` storage."""
