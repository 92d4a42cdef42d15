"""Weight ranges that follow the weights: what a codec takes from a matrix to pack it, taken anew in every forward.

Scales of INT4 groups, of channels and of 128 x 128 blocks are each matrix's own and are derived from it when it is
packed; ModelOpt keeps the ranges that calibration saw. While weights are trained the two would part. Block scales of
NVFP4 and MX are computed from the weights in any case; one range for a whole tensor is shared (q/k/v, experts of one
tensor) and stays as calibrated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from toolchain.quantize import backend


def follow(model: nn.Module, paths: Iterable[str]) -> None:
    """Let the weight quantizers of the Linears at ``paths`` take their ranges from the weights they are given.

    The gradient does not go through the range: rounding and scaling are straight-through together.
    """
    for path in paths:
        for quantizer in _own_ranges(model.get_submodule(path)):
            quantizer.backend_extra_args = backend.CURRENT_RANGE
            if hasattr(quantizer, "_amax"):
                del quantizer._amax  # of weights as calibration saw them


def has_own_ranges(quantizer: Any) -> bool:
    """True for a weight quantizer with ranges of channels or static blocks, which packing takes from the weights."""
    own = quantizer.axis is not None or quantizer.is_static_block_quant
    return bool(own and quantizer.is_enabled and not quantizer._dynamic)


def _own_ranges(linear: Any) -> list[Any]:
    """The weight quantizers of a Linear that hold ranges of channels or static blocks."""
    from modelopt.torch.quantization.nn import SequentialQuantizer

    found = linear.weight_quantizer
    every = list(found) if isinstance(found, SequentialQuantizer) else [found]
    return [item for item in every if has_own_ranges(item)]
