"""Checkpoint directories -> running transformers models with one Linear per expert.

``load_source`` loads what will be quantized. ``load_checkpoint`` loads what was exported: it decodes the packed weights
with our codecs and makes the model compute on the activations and the KV cache that the target's kernels would see.
transformers itself cannot read these files back: it drops FP8 scales silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.checkpoint.quant_config import QuantConfig, read_quant_config
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.checkpoint.source import QuantizedSource, open_source
from toolchain.codecs import get_codec
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json
from toolchain.families import get_family
from toolchain.formats import WEIGHT_SCALES
from toolchain.modeling.emulation import ATTRIBUTE, Emulation
from toolchain.modeling.experts import unfuse_experts
from toolchain.modeling.filling import Filler, empty_model, quiet_transformers
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
    """The model of a Hugging Face directory in evaluation mode, experts unfused; ``dtype`` None keeps its own.

    A quantized source (``models/prequantized.py``) is dequantized tensor by tensor.
    """
    from transformers import AutoModelForCausalLM

    reader = open_source(directory)
    if isinstance(reader, QuantizedSource):
        return _fill(directory, reader, None, dtype).model.eval().to(device)
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
    are applied all the same. With it, ``modeling/emulation.py`` switches the rounding off and on again. Raises
    ToolchainError when tensors are missing or belong to no module.
    """
    reader = open_source(directory)
    # Published FP8 and MXFP4 files have no activations that were calibrated: they stand for their values.
    quant = None if isinstance(reader, QuantizedSource) else read_quant_config(directory)
    filler = _fill(directory, reader, quant, dtype)
    model = filler.model.eval().to(device)
    switches = Emulation()
    for quantized in filler.inputs:
        quantized.attach(device, emulate=emulate_activations, switches=switches)
    if emulate_activations and quant and quant.kv_cache_quant_algo:
        emulate_kv_cache(model, quant.kv_cache_quant_algo, filler.kv_scales, switches)
    setattr(model, ATTRIBUTE, switches)
    return model


def _fill(
    directory: Path, reader: CheckpointReader, quant: QuantConfig | None, dtype: torch.dtype | None
) -> Filler:
    """The architecture of config.json with every tensor of ``reader`` in its place."""
    config_json = read_json(directory / "config.json")
    family = get_family(
        config_json.get("model_type", ""), (config_json.get("architectures") or [""])[0], list(reader.infos)
    )
    model = empty_model(directory, dtype)
    filler = Filler(model, family, model.dtype)
    for module_name, suffixes in reader.modules(family):
        tensors = {suffix: reader.get(name) for suffix, name in suffixes.items()}
        found = quant.format_of(module_name) if quant and suffixes.keys() & set(WEIGHT_SCALES) else None
        filler.fill(module_name, tensors, get_codec(found.name) if found else None)
    filler.finish(directory)
    return filler


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


__all__ = ["load_checkpoint", "load_source", "pick_device", "quiet_transformers"]
