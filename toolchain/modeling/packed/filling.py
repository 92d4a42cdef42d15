"""Fills an empty model from a checkpoint and leaves packed what the kernels can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from toolchain.codecs import Codec
from toolchain.core.errors import ToolchainError
from toolchain.families import Family
from toolchain.kernels.kinds import Kind, kind_of
from toolchain.kernels.packing import Packed, pack
from toolchain.modeling.experts import UnfusedExperts
from toolchain.modeling.filling import Filler
from toolchain.modeling.packed.chooser import Chooser
from toolchain.modeling.packed.experts import FusedExperts, activation_of, scales_its_input
from toolchain.modeling.packed.linear import PackedLinear

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class PackedFiller(Filler):
    """As ``Filler``, on a model without memory (meta); packed tensors go to ``device`` one by one."""

    def __init__(
        self, model: Any, family: Family, dtype: torch.dtype, device: torch.device, chooser: Chooser
    ) -> None:
        super().__init__(model, family, dtype)
        self.device, self.chooser = device, chooser
        self._capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        self.decoded: dict[str, str] = {}
        """Module -> why it is not packed."""
        self._experts: dict[str, dict[tuple[int, str], tuple[str, dict[str, torch.Tensor], Codec]]] = {}
        """Path of experts -> (expert, projection) -> checkpoint name, stored tensors and codec, until all are there."""

    def fill_quantized(self, name: str, tensors: Mapping[str, torch.Tensor], codec: Codec) -> None:
        path = self.family.to_module(name)
        kind = self._kind(codec.format.name, [tensors])
        if kind is None:
            self._decode(name, tensors, codec, f"there are no kernels for {codec.format.name}")
            return
        moved = {suffix: tensor.to(self.device) for suffix, tensor in tensors.items()}
        owner, expert, projection = _split(path)
        if projection in PROJECTIONS and isinstance(self._module(owner), UnfusedExperts):
            waiting = self._experts.setdefault(owner, {})
            waiting[expert, projection] = (name, moved, codec)
            if len(waiting) == 3 * self.model.get_submodule(owner).num_experts:
                self._fuse(owner)
            return
        module = self._module(path)
        if not isinstance(module, nn.Linear):
            self.unknown.append(f"{path}.weight")
            return
        packed = pack(kind, [[moved]], self.dtype)
        self._check(path, packed, module.weight.shape)
        self._replace(path, PackedLinear(packed, self.chooser))
        self._note_kv(path, tensors)

    def finish_experts(self) -> None:
        """Decode the experts that could not be fused, because some of them are stored in another way."""
        for owner in list(self._experts):
            self._decode_all(owner, "its experts are not all stored in one way")

    def _fuse(self, owner: str) -> None:
        experts = self.model.get_submodule(owner)
        waiting = self._experts[owner]
        activation = activation_of(list(experts))
        formats = {codec.format.name for _, _, codec in waiting.values()}
        if activation is None or len(formats) != 1:
            why = (
                "there are no kernels for its activation" if len(formats) == 1 else "its experts mix formats"
            )
            self._decode_all(owner, why)
            return
        kind = self._kind(formats.pop(), [tensors for _, tensors, _ in waiting.values()])
        assert kind is not None
        sets = [
            {projection: waiting[index, projection][1] for projection in PROJECTIONS}
            for index in range(experts.num_experts)
        ]
        gate_up = pack(kind, [[each["gate_proj"], each["up_proj"]] for each in sets], self.dtype)
        down = pack(kind, [[each["down_proj"]] for each in sets], self.dtype)
        out, width = experts[0].gate_proj.weight.shape
        self._check(f"{owner}.gate_proj", gate_up, torch.Size((2 * out, width)))
        self._check(f"{owner}.down_proj", down, experts[0].down_proj.weight.shape)
        del self._experts[owner]
        config = self.model.config.get_text_config()
        top_k = next((getattr(config, key) for key in TOP_K_KEYS if getattr(config, key, None)), 1)
        fused = FusedExperts(
            gate_up, down, activation, self.chooser, scales_input=scales_its_input(experts), top_k=int(top_k)
        )
        self._replace(owner, fused)

    def _kind(self, format: str, stored: Sequence[Mapping[str, torch.Tensor]]) -> Kind | None:
        """Inputs can only be rounded to NVFP4 where every matrix has a scale for them."""
        can_round = all("input_scale" in tensors for tensors in stored)
        return kind_of(format, self._capability if can_round else None)

    def _decode_all(self, owner: str, why: str) -> None:
        for name, tensors, codec in self._experts.pop(owner).values():
            self._decode(name, tensors, codec, why)

    def _decode(self, name: str, tensors: Mapping[str, torch.Tensor], codec: Codec, why: str) -> None:
        self.decoded[self.family.to_module(name)] = why
        super().fill_quantized(name, tensors, codec)

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(path) if path else None
        except AttributeError:
            return None

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)

    @staticmethod
    def _check(path: str, packed: Packed, shape: torch.Size) -> None:
        if (packed.n, packed.k) != tuple(shape):
            raise ToolchainError(
                f"{path} has shape {(packed.n, packed.k)} in the checkpoint, {tuple(shape)} by config.json",
                hint="config.json and the shards are not of the same model",
                code="TC-304",
            )


TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k")


def _split(path: str) -> tuple[str, int, str]:
    """``model.layers.0.mlp.experts.3.gate_proj`` -> (``model.layers.0.mlp.experts``, 3, ``gate_proj``)."""
    parent, _, projection = path.rpartition(".")
    owner, _, index = parent.rpartition(".")
    return (owner, int(index), projection) if index.isdigit() else ("", 0, "")
