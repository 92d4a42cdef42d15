"""Checkpoint directories -> running transformers models with one Linear per expert.

``load_source`` loads what will be quantized. ``load_checkpoint`` loads what was exported: it decodes the packed weights
with our codecs and makes the model compute on the activations and the KV cache that the target's kernels would see.
transformers itself cannot read these files back: it drops FP8 scales silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.checkpoint.quant_config import read_quant_config
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.codecs import Codec, get_codec
from toolchain.codecs.fused import split_experts
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json
from toolchain.families import Family, get_family
from toolchain.formats import WEIGHT_SCALES
from toolchain.modeling.experts import unfuse_experts
from toolchain.modeling.inputs import QuantizedInput
from toolchain.modeling.kv_cache import emulate_kv_cache


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the first CUDA device if there is one, else the CPU. UsageError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N", code="TC-507"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"device {name!r} is not supported; expected auto, cpu, cuda or cuda:N", code="TC-507"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices",
            hint="use --device cpu, or run where a GPU is",
            code="TC-507",
        )
    return device


def load_source(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of a plain Hugging Face directory in evaluation mode, experts unfused; ``dtype`` None keeps its own."""
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            experts_implementation="eager",
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ToolchainError(
            f"transformers cannot load {directory}: {type(error).__name__}: {error}",
            hint="tensors may be missing or of another shape than config.json says; `toolchain plan` reads the headers",
            code="TC-304",
        ) from error
    _refuse_holes(directory, report)
    unfuse_experts(model)
    return model.eval().to(device)


def load_checkpoint(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    emulate_activations: bool = True,
) -> nn.Module:
    """Any exported or plain checkpoint directory as a transformers CausalLM in evaluation mode.

    ``emulate_activations=False`` computes on unquantized activations and cache (weight-only view); AWQ's channel scales
    are applied all the same. Raises ToolchainError when tensors are missing or belong to no module.
    """
    reader = CheckpointReader(directory)
    quant = read_quant_config(directory)
    config_json = read_json(directory / "config.json")
    family = get_family(
        config_json.get("model_type", ""), (config_json.get("architectures") or [""])[0], list(reader.infos)
    )
    model = _empty_model(directory, dtype)
    filler = _Filler(model, family, model.dtype)
    for module_name, suffixes in reader.modules(family):
        tensors = {suffix: reader.get(name) for suffix, name in suffixes.items()}
        found = quant.format_of(module_name) if quant and suffixes.keys() & set(WEIGHT_SCALES) else None
        whole = [(module_name, tensors)]
        for name, own in (
            split_experts(family, module_name, tensors) if family.is_fused(module_name) else whole
        ):
            if found is not None:
                filler.fill_quantized(name, own, get_codec(found.name))
            else:
                filler.fill_plain(name, own)
    filler.finish(directory)
    model = model.eval().to(device)
    for quantized in filler.inputs:
        quantized.attach(device, emulate=emulate_activations)
    if emulate_activations and quant and quant.kv_cache_quant_algo:
        emulate_kv_cache(model, quant.kv_cache_quant_algo, filler.kv_scales)
    return model


def _refuse_holes(directory: Path, report: Mapping[str, Any]) -> None:
    """transformers fills what the files lack with random numbers and only warns."""
    missing = sorted(map(str, report.get("missing_keys") or ()))
    mismatched = sorted(map(str, report.get("mismatched_keys") or ()))
    if missing or mismatched:
        raise ToolchainError(
            f"{directory} does not hold the model that its config.json describes: {len(missing)} weights missing "
            f"{missing[:3]}, {len(mismatched)} of another shape {mismatched[:3]}",
            hint="fetch the model again, or correct config.json",
            code="TC-304",
        )


def quiet_transformers() -> None:
    """Its bars and warnings off: progress is ours, and what matters is checked."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _empty_model(directory: Path, dtype: torch.dtype | None) -> Any:
    """The architecture of config.json with uninitialised weights; untouched pages cost no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    quiet_transformers()
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype, experts_implementation="eager"
        )
    unfuse_experts(model, blank=True)
    return model


class _Filler:
    """Puts checkpoint tensors into the modules of an empty model and remembers what was filled."""

    def __init__(self, model: Any, family: Family, dtype: torch.dtype) -> None:
        self.model, self.family, self.dtype = model, family, dtype
        self.filled: set[str] = set()
        self.unknown: list[str] = []
        self.kv_scales: dict[str, dict[str, float]] = {}
        self.inputs: list[QuantizedInput] = []
        patterns = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
        self.fp32 = re.compile("|".join(patterns)) if patterns else None

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

    def _beyond(self, name: str, layers: int) -> bool:
        layer = self.family.classify(name).layer
        return (layer is not None and layer >= layers) or name.endswith("rotary_emb.inv_freq")
