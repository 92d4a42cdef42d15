"""Scales after calibration: merge what runtimes fuse, before anything is packed or judged.

ModelOpt merges siblings only at export, so that the model it evaluated in memory is not the one that ships (differences
up to 2e-2 were measured). Merging first makes both the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolchain.codecs import Calibrated
from toolchain.core.errors import ToolchainError
from toolchain.modeling.experts import UnfusedExperts

FP8_MAX = 448.0


def merge_fused(model: nn.Module, groups: list[list[str]]) -> None:
    """One weight amax and one input amax for the members of each group (the largest), where they are of the tensor."""
    for group in groups:
        modules: list[Any] = [model.get_submodule(path) for path in group]
        for name in ("weight_quantizer", "input_quantizer"):
            quantizers = [found for module in modules if (found := tensor_quantizer(getattr(module, name)))]
            amaxes = [q.amax for q in quantizers if q.amax is not None]
            if amaxes:
                largest = torch.stack([amax.reshape(()) for amax in amaxes]).amax()
                for quantizer in quantizers:
                    quantizer.amax = largest.clone()


def tensor_quantizer(quantizer: Any) -> Any:
    """The quantizer that holds one amax for the whole tensor, or None: W4A8 has it behind the one of the groups; scales
    of channels and of static blocks are each matrix's own, even where there is only one."""
    from modelopt.torch.quantization.nn import SequentialQuantizer

    if isinstance(quantizer, SequentialQuantizer):
        quantizer = quantizer[-1]
    if not quantizer.is_enabled or quantizer.axis is not None:
        return None
    blocks = quantizer.block_sizes
    return quantizer if blocks is None or blocks.get("type") == "dynamic" else None


def share_expert_inputs(model: nn.Module) -> None:
    """One input amax for each projection of all routed experts of a layer: the largest.

    An expert that saw no token has none of its own, and a checkpoint without its ``input_scale`` does not load or gives
    NaN. ModelOpt does this (``sync_moe_expert_amax``), but only in blocks that call their router ``gate``; TensorRT-LLM
    takes the largest ``input_scale`` of a layer's experts when it loads, so nothing is lost by it.
    """
    for experts in [module for module in model.modules() if isinstance(module, UnfusedExperts)]:
        found: dict[str, list[Any]] = {}
        for expert in experts:
            for name, module in expert.named_modules():
                quantizer = getattr(module, "input_quantizer", None)
                if quantizer is not None and quantizer.is_enabled:
                    found.setdefault(name, []).append(quantizer)
        for quantizers in found.values():
            amaxes = [q.amax for q in quantizers if q.amax is not None and q.amax.numel() == 1]
            if amaxes:
                largest = torch.stack([amax.reshape(()) for amax in amaxes]).amax()
                for quantizer in quantizers:
                    quantizer.amax = largest.clone()


def calibrated(module: Any, path: str, *, needs_input: bool) -> Calibrated:
    """What packing needs to know about one quantized Linear. TC-202 when no token reached it."""
    inputs = module.input_quantizer
    input_amax = inputs.amax if inputs.is_enabled else None
    if needs_input and (
        input_amax is None or not torch.isfinite(input_amax).all() or not (input_amax > 0).all()
    ):
        raise ToolchainError(
            f"{path} has no usable input range after calibration ({input_amax})",
            hint="calibrate with more or longer samples",
            code="TC-202",
        )
    return Calibrated(
        weight_amax=_scalar(tensor_quantizer(module.weight_quantizer)),
        input_amax=None if input_amax is None else input_amax.reshape(()).float(),
        pre_quant_scale=getattr(inputs, "_pre_quant_scale", None),
    )


def _scalar(quantizer: Any) -> torch.Tensor | None:
    return None if quantizer is None or quantizer.amax is None else quantizer.amax.reshape(()).float()


def kv_scales(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Attention module path -> (k_scale, v_scale), float32 scalars: amax / 448, for FP8 at least 1.0.

    The floor is ModelOpt's (``get_kv_cache_scaling_factor``): E4M3 has range enough, and runtimes prefer scale 1. The
    quantizers in memory get the same floor, so that they round as the exported checkpoint will. A cache without
    calibrated scales (``fp8_cast``) has none.
    """
    found = {}
    for path, module in model.named_modules():
        quantizers = [getattr(module, name, None) for name in ("k_bmm_quantizer", "v_bmm_quantizer")]
        if any(q is None or not q.is_enabled or q.amax is None for q in quantizers):
            continue
        scales = []
        for quantizer in quantizers:
            amax = quantizer.amax.reshape(()).float()  # type: ignore[union-attr]
            if quantizer.num_bits == (4, 3):  # type: ignore[union-attr]
                amax = amax.clamp(min=FP8_MAX)
            quantizer.amax = amax  # type: ignore[union-attr]
            scales.append(amax / FP8_MAX)
        found[path] = (scales[0], scales[1])
    return found
