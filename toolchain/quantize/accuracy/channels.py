"""Channel scales: divide the input of a group of Linears, multiply their weights, and keep everything consistent.

Two ways to find them: ``awq`` (for weights of four bits) and ``smoothquant`` (for activations of eight).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolchain.quantize import scales
from toolchain.quantize.accuracy import awq, smoothquant
from toolchain.quantize.accuracy.groups import Group

SEARCHES = {"awq": awq.search, "smoothquant": smoothquant.search}


def transform(model: nn.Module, group: Group, method: str) -> float | None:
    """Search and apply the scale of ``group`` in place; returns its alpha.

    A group whose input no token reached gets scale 1 (runtimes want the tensor of every expert) and None.
    """
    weights = [model.get_submodule(path).weight.data for path in group.paths]
    if not group.statistics.tokens:
        apply(model, group, torch.ones(weights[0].shape[1], device=weights[0].device))
        return None
    scale, alpha = SEARCHES[method](weights, group.statistics)
    apply(model, group, scale)
    return alpha


def apply(model: nn.Module, group: Group, scale: torch.Tensor) -> None:
    """Divide the group's input by ``scale`` and multiply its weights with it.

    With a norm: the norm's weight takes the division. The factor that really resulted after rounding to the norm's
    dtype is what the weights are multiplied with, so rounding the norm costs nothing.
    """
    modules: list[Any] = [model.get_submodule(path) for path in group.paths]
    dtype = modules[0].weight.dtype
    factor = (1.0 / scale).to(dtype)
    if group.norm is not None:
        norm: Any = model.get_submodule(group.norm)
        folded = (norm.weight.float() * factor.float()).to(norm.weight.dtype)
        usable = (norm.weight != 0) & (folded != 0)
        effective = torch.where(usable, folded.float() / norm.weight.float(), torch.ones_like(scale))
        norm.weight.data = torch.where(usable, folded, norm.weight.data)
    else:
        effective = factor.float()
    group.statistics.rescale(effective)
    for module in modules:
        module.weight.data = (module.weight.float() / effective).to(dtype)
        if group.norm is None:
            module.input_quantizer._enable_pre_quant_scale = True
            module.input_quantizer.pre_quant_scale = factor.clone()
        _recalibrate(module, group)
    scales.merge_fused(model, [list(group.paths)])  # their own new ranges differ; runtimes keep one


def _recalibrate(module: Any, group: Group) -> None:
    """Weight and input changed: let their quantizers take the new ranges."""
    from modelopt.torch.quantization.model_calib import max_calibrate

    module.weight_quantizer.reset_amax()
    max_calibrate(module.weight_quantizer, lambda quantizer: quantizer(module.weight), distributed_sync=False)
    quantizer, largest = module.input_quantizer, group.statistics.largest
    if quantizer.is_enabled and quantizer.amax is not None and largest is not None:
        quantizer.reset_amax()  # a buffer in bfloat16 would round the range that is stored in float32
        quantizer.amax = largest.max()
