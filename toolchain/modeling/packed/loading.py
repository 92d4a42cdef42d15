"""Checkpoint directory -> a transformers model whose quantized weights stay packed on a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.checkpoint.quant_config import QuantConfig, read_quant_config
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.checkpoint.source import QuantizedSource, open_source
from toolchain.codecs import Codec, get_codec
from toolchain.core.files import read_json
from toolchain.families import get_family
from toolchain.formats import WEIGHT_SCALES
from toolchain.modeling.filling import empty_model
from toolchain.modeling.packed.chooser import Chooser, processors_of
from toolchain.modeling.packed.filling import PackedFiller
from toolchain.modeling.packed.routers import fuse_routers
from toolchain.models.prequantized import FP8

OLDEST = (8, 0)
"""Compute capability of Ampere: bfloat16 tensor cores and asynchronous copies."""
NOT_QUANTIZED = "its weights are not quantized"
DECODED = "toolchain_decoded"
"""Attribute of a packed model: module -> why it is not packed."""
KV_SCALES = "toolchain_kv_scales"
"""Attribute: attention module -> {"k_scale", "v_scale"}, as the checkpoint stores them."""


def why_not_packed(directory: Path, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why the weights of ``directory`` must be decoded on ``device``; None when they can stay packed."""
    return why_no_kernels(device) or why_not_stored(directory, dtype)


def why_no_kernels(device: torch.device) -> str | None:
    """Why the fused kernels cannot run on ``device``; None when they can."""
    if device.type != "cuda":
        return f"the fused kernels need an NVIDIA GPU, this is {device}"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        found = ".".join(map(str, capability))
        return (
            f"the fused kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has {found}"
        )
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    return None


def why_not_stored(directory: Path, dtype: torch.dtype | None) -> str | None:
    """The same as ``why_not_packed``, of the files alone."""
    config = read_json(directory / "config.json")
    if isinstance(open_source(directory), QuantizedSource):
        stored = True
    else:
        quant = read_quant_config(directory)
        stored = quant is not None and bool({quant.quant_algo, *quant.quantized_layers.values()} - {None})
    if not stored:
        return NOT_QUANTIZED
    named = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if str(dtype or named).removeprefix("torch.") != "bfloat16":
        return f"the fused kernels compute in bfloat16, the model is {dtype or named}"
    return None


def load_packed(directory: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """As ``load_checkpoint``, in evaluation mode, without emulation: inputs are rounded where the kernels round them.

    Modules that no kernel can read are decoded; attribute ``toolchain_decoded`` names them. Raises ToolchainError when
    tensors are missing or belong to no module.
    """
    reader = open_source(directory)
    published = isinstance(reader, QuantizedSource)
    quant = None if published else read_quant_config(directory)
    config = read_json(directory / "config.json")
    family = get_family(
        config.get("model_type", ""), (config.get("architectures") or [""])[0], list(reader.infos)
    )
    model = empty_model(directory, dtype, on_meta=True)
    chooser = Chooser(processors=processors_of(device))
    filler = PackedFiller(model, family, model.dtype, device, chooser)
    for module, suffixes in reader.modules(family):
        tensors, codec = _stored(reader, quant, module, suffixes)
        filler.fill(module, tensors, codec)
    filler.finish_experts()
    filler.finish(directory)
    for quantized in filler.inputs:
        # Decoded modules: their inputs are rounded as their codec has it.
        quantized.attach(device, emulate=True)
    model = model.eval().to(device)
    fuse_routers(model)
    setattr(model, DECODED, filler.decoded)
    setattr(model, KV_SCALES, filler.kv_scales)
    model.toolchain_chooser = chooser
    return model


def _stored(
    reader: CheckpointReader, quant: QuantConfig | None, module: str, suffixes: dict[str, str]
) -> tuple[dict[str, Any], Codec | None]:
    """The tensors of one module as they are stored, and the codec of its format; None for a plain one."""
    if not isinstance(reader, QuantizedSource):
        tensors = {suffix: reader.get(name) for suffix, name in suffixes.items()}
        found = quant.format_of(module) if quant and suffixes.keys() & set(WEIGHT_SCALES) else None
        return tensors, get_codec(found.name) if found else None
    name = suffixes.get("weight", "")
    usable = reader.scheme.method != FP8 or reader.scheme.block == (128, 128)
    if name not in reader.quantized or not usable:
        return {suffix: reader.get(name) for suffix, name in suffixes.items()}, None
    tensors = {suffix: reader.get(other) for suffix, other in suffixes.items() if suffix != "weight"}
    tensors.update(reader.codes(name) or {})
    return tensors, get_codec("fp8_block" if reader.scheme.method == FP8 else "mxfp4")


def packed_bytes(model: nn.Module) -> int:
    """All that the weights of a packed model take in memory."""
    from toolchain.modeling.packed.experts import FusedExperts
    from toolchain.modeling.packed.linear import PackedLinear

    total = sum(tensor.nbytes for tensor in {id(item): item for item in model.parameters()}.values())
    total += sum(tensor.nbytes for tensor in model.buffers())
    for module in model.modules():
        if isinstance(module, PackedLinear):
            total += module.packed.nbytes
        elif isinstance(module, FusedExperts):
            total += module.gate_up.nbytes + module.down.nbytes
    return total


__all__ = ["load_packed", "packed_bytes", "why_no_kernels", "why_not_packed", "why_not_stored"]
