"""Input scales of NVFP4 with room for activations larger than calibration saw: ModelOpt's ``nvfp4_act_headroom``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def headroom(model: nn.Module, paths: list[str]) -> Iterator[None]:
    """While active, the input quantizers of ``paths`` collect the distribution of block ranges instead of the maximum.

    amax becomes max(rho * 1st percentile, 99.99th percentile) of the ranges of blocks (ModelOpt 0.47
    ``NVFP4ActHeadroomCalibrator`` and the defaults of its recipe): block scales are E4M3 numbers below it, and
    the smallest of them should not be subnormal.
    """
    from modelopt.torch.quantization.calib import NVFP4ActHeadroomCalibrator
    from modelopt.torch.quantization.config import NVFP4ActHeadroomCalibConfig

    defaults = NVFP4ActHeadroomCalibConfig()
    quantizers: list[Any] = [model.get_submodule(path).input_quantizer for path in paths]
    before = [quantizer._calibrator for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer._calibrator = NVFP4ActHeadroomCalibrator(
            quantizer.num_bits,
            None,
            quantizer._unsigned,
            block_size=quantizer.block_sizes[-1],
            anchor_percentile=defaults.anchor_percentile,
            upper_percentile=defaults.upper_percentile,
            rho=defaults.rho,
        )
    try:
        yield
    finally:
        for quantizer, calibrator in zip(quantizers, before, strict=True):
            quantizer._calibrator = calibrator
