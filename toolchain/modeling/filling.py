"""An empty model, filled tensor by tensor from a checkpoint: what was filled is remembered, holes are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.codecs import Codec
from toolchain.codecs.fused import split_experts
from toolchain.core.errors import ToolchainError
from toolchain.families import Family
from toolchain.modeling.experts import unfuse_experts
from toolchain.modeling.inputs import QuantizedInput


def quiet_transformers() -> None:
    """Its bars and warnings off: progress is ours, and what matters is checked."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def empty_model(
    directory: Path, dtype: torch.dtype | None, *, on_meta: bool = False, trust_remote_code: bool = False
) -> Any:
    """The architecture of config.json with uninitialised weights; untouched pages cost no memory.

    ``on_meta``: parameters have no memory at all; buffers (rotary frequencies) are real, since no file has them.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    quiet_transformers()
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    on = init_empty_weights(include_buffers=False) if on_meta else nullcontext()
    with no_init_weights(), on:
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype or config.dtype,
            experts_implementation="eager",
            trust_remote_code=trust_remote_code,
        )
    unfuse_experts(model, blank=True)
    return model


class Filler:
    """Puts checkpoint tensors into the modules of an empty model and remembers what was filled."""

    def __init__(self, model: Any, family: Family, dtype: torch.dtype) -> None:
        self.model, self.family, self.dtype = model, family, dtype
        self.filled: set[str] = set()
        self.unknown: list[str] = []
        self.kv_scales: dict[str, dict[str, float]] = {}
        self.inputs: list[QuantizedInput] = []
        # As transformers has it: the first list is for float16 alone.
        patterns = [*(model._keep_in_fp32_modules_strict or ())]
        if dtype == torch.float16:
            patterns += model._keep_in_fp32_modules or ()
        self.fp32 = re.compile("|".join(patterns)) if patterns else None

    def fill(self, module: str, tensors: Mapping[str, torch.Tensor], codec: Codec | None = None) -> None:
        """Put the tensors (suffix -> tensor) of one module of the checkpoint in place; ``codec`` when it is packed."""
        fused = self.family.is_fused(module)
        for name, own in split_experts(self.family, module, tensors) if fused else [(module, tensors)]:
            if codec is None:
                self.fill_plain(name, own)
            else:
                self.fill_quantized(name, own, codec)

    def fill_quantized(self, name: str, tensors: Mapping[str, torch.Tensor], codec: Codec) -> None:
        path = self.family.to_module(name)
        self._put(path, "weight", codec.unpack(tensors, self.dtype))
        if "bias" in tensors:
            self._put(path, "bias", tensors["bias"].to(self.dtype))
        self._note_kv(path, tensors)
        self.inputs.append(QuantizedInput.of(self.model.get_submodule(path), codec, tensors))

    def fill_plain(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        path = self.family.to_module(name)
        self._note_kv(path, tensors)
        for suffix, tensor in tensors.items():
            if suffix in ("k_scale", "v_scale"):
                continue
            keep = self.fp32 is not None and self.fp32.search(f"{path}.{suffix}")
            target = torch.float32 if keep else self.dtype
            self._put(path, suffix, tensor.to(target) if tensor.is_floating_point() else tensor)

    def _note_kv(self, path: str, tensors: Mapping[str, torch.Tensor]) -> None:
        for suffix in ("k_scale", "v_scale"):
            if suffix in tensors:
                self.kv_scales.setdefault(path.rpartition(".")[0], {})[suffix] = float(tensors[suffix])

    def _put(self, path: str, suffix: str, tensor: torch.Tensor) -> None:
        try:
            module = self.model.get_submodule(path)
            old = getattr(module, suffix)
        except AttributeError:
            self.unknown.append(f"{path}.{suffix}")
            return
        if old.shape != tensor.shape:
            raise ToolchainError(
                f"{path}.{suffix} has shape {tuple(tensor.shape)} in the checkpoint, {tuple(old.shape)} by config.json",
                hint="config.json and the shards are not of the same model",
                code="TC-304",
            )
        if isinstance(old, nn.Parameter):
            setattr(module, suffix, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(module, suffix, tensor)
        self.filled.add(f"{path}.{suffix}")

    def finish(self, directory: Path) -> None:
        """Tie weights, then refuse a model with holes. Tensors of no module are fine only in extra (MTP) layers."""
        self.model.tie_weights()
        tied = set(self.model.all_tied_weights_keys or ())
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        missing = sorted(names - self.filled - tied)
        layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", 0)
        foreign = [name for name in self.unknown if not self._beyond(name, layers)]
        if missing or foreign:
            raise ToolchainError(
                f"{directory} does not match its config.json: {len(missing)} weights missing {missing[:3]}, "
                f"{len(foreign)} tensors belong to no module {foreign[:3]}",
                hint="run `toolchain verify` on it",
                code="TC-304",
            )

    def finish_part(self, directory: Path, part: nn.Module) -> None:
        """For a model of which only ``part`` is there: all of its parameters must have come from the files."""
        missing = sorted(name for name, tensor in part.named_parameters() if tensor.is_meta)
        if missing:
            raise ToolchainError(
                f"{directory} does not match its config.json: {len(missing)} weights missing {missing[:3]}",
                hint="run `toolchain verify` on it",
                code="TC-304",
            )

    def _beyond(self, name: str, layers: int) -> bool:
        layer = self.family.classify(name).layer
        return (
            (layer is not None and layer >= layers)
            or name.endswith("rotary_emb.inv_freq")
            or self.family.is_tower(name)
        )
