"""Microscaling arithmetic: elements in blocks of 32 under one power of two, stored as a biased exponent (E8M0).

The exponent is the smallest whose block does not overflow: ceil(log2(amax / largest element)), as ModelOpt 0.47 takes
it (``qtensor/mxfp4_tensor.py``, ``mxfp8_tensor.py``); the OCP specification suggests floor(log2 amax) - emax, which
saturates. MXFP4 weights round ties towards zero and store zero as -0, as ModelOpt's packing does: bit-exact with it.
"""

from __future__ import annotations

import torch

from toolchain.codecs import compiled
from toolchain.codecs.e2m1 import E2M1_MAX, E4M3_MAX, pack_nibbles, values_of

BLOCK = 32
BIAS = 127
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def exponents(x: torch.Tensor, largest: float) -> torch.Tensor:
    """[..., K] -> float32 exponents [..., K/32] in -127..127; -127 for a block of zeros."""
    amax = compiled.block_amax(x, BLOCK)
    if amax is None:
        amax = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1).float()
    return torch.log2(amax / largest).ceil().clamp_(-BIAS, BIAS)


def stored_scales(exponent: torch.Tensor) -> torch.Tensor:
    """Exponents -> E8M0 bytes."""
    return (exponent + BIAS).to(torch.uint8)


def factors(scales: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes -> float32 powers of two."""
    return torch.exp2(scales.float() - BIAS)


def encode_fp4(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """[..., K] -> uint8 E2M1 codes [..., K], ties towards zero, zero as code 8 (-0)."""
    scaled = (x.unflatten(-1, (-1, BLOCK)) / torch.exp2(exponent).unsqueeze(-1)).flatten(-2)
    negative = ~(scaled > 0)
    magnitude = scaled.abs_()
    codes = torch.zeros(magnitude.shape, dtype=torch.uint8, device=magnitude.device)
    for midpoint in _MIDPOINTS:
        codes += magnitude > midpoint
    return codes | (negative.to(torch.uint8) << 3)


def pack_fp4(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """The same, two in a byte [..., K/2], even elements low."""
    packed = compiled.pack_mxfp4(x, torch.exp2(exponent))
    return pack_nibbles(encode_fp4(x, exponent)) if packed is None else packed


def encode_fp8(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """[..., K] -> E4M3 [..., K]."""
    scaled = x.unflatten(-1, (-1, BLOCK)) * torch.exp2(-exponent).unsqueeze(-1)
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).flatten(-2)


def decode(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Unscaled float32 values [..., K] with E8M0 bytes [..., K/32] -> values in ``dtype``."""
    return (values.unflatten(-1, (-1, BLOCK)) * factors(scales).unsqueeze(-1)).flatten(-2).to(dtype)


def fake_quantize_fp8(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> the values that MXFP8 would hold, same dtype."""
    exponent = exponents(x, E4M3_MAX)
    return decode(encode_fp8(x, exponent).float(), stored_scales(exponent), x.dtype)


def fake_quantize_fp4(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> the values that MXFP4 would hold, same dtype."""
    exponent = exponents(x, E2M1_MAX)
    return decode(values_of(encode_fp4(x, exponent)), stored_scales(exponent), x.dtype)
