"""NVFP4 arithmetic: E2M1 elements, E4M3 scale per block of 16 (W4A8: 32), FP32 scale per tensor.

Source: ModelOpt 0.47 ``qtensor/nvfp4_tensor.py`` (rounding to nearest, ties to even mantissa; block scale clamped to
[2**-9, 448]; an all-zero block has scale 1). Bit-exact with it (tests/test_codecs.py).
"""

from __future__ import annotations

import torch

from toolchain.codecs.base import usable_amax

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
"""Smallest subnormal of E4M3."""
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0..7; bit 3 is the sign."""
_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
"""Midpoints whose even neighbour is the lower one: only larger magnitudes round up."""
_TIES_UP = (0.75, 1.75, 3.5)


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """``weight_scale_2`` or ``input_scale`` from an amax: amax / (6 * 448), float32."""
    return usable_amax(amax) / (E2M1_MAX * E4M3_MAX)


def global_scale_fp8(amax: torch.Tensor) -> torch.Tensor:
    """The same where kernels expand the blocks to E4M3 and need them below 448: amax / 448, float32."""
    return usable_amax(amax) / E4M3_MAX


def block_scales(x: torch.Tensor, scale_2: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """[..., K] -> E4M3 scales [..., K/block] under the tensor scale ``scale_2``."""
    amax = x.unflatten(-1, (-1, block)).abs().amax(-1).float()
    scales = amax / (E2M1_MAX * scale_2)
    scales[scales == 0] = 1.0
    return scales.clamp_(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def magnitude_codes(magnitude: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 -> uint8 codes 0..7 (saturating at 6)."""
    codes = torch.zeros(magnitude.shape, dtype=torch.uint8, device=magnitude.device)
    for tie in _TIES_DOWN:
        codes += magnitude > tie
    for tie in _TIES_UP:
        codes += magnitude >= tie
    return codes


def encode(x: torch.Tensor, scales: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """[..., K] with its block scales [..., K/block] -> uint8 codes [..., K] (sign in bit 3)."""
    blocks = x.unflatten(-1, (scales.shape[-1], -1))
    scaled = (blocks / (scales.float() * scale_2).unsqueeze(-1)).flatten(-2)
    negative = scaled < 0
    return magnitude_codes(scaled.abs_()) | (negative.to(torch.uint8) << 3)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[..., K] codes -> [..., K/2] bytes, even elements in the low nibble."""
    return (codes[..., 1::2] << 4) | codes[..., 0::2]


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of ``pack_nibbles``."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def values_of(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes -> float32 values, unscaled."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.float32, device=codes.device)
    return table[codes.int()]


def decode(
    codes: torch.Tensor, scales: torch.Tensor, scale_2: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """uint8 codes [..., K] with block scales [..., K/block] -> values in ``dtype``."""
    values = values_of(codes).unflatten(-1, (scales.shape[-1], -1))
    return (values * (scales.float() * scale_2).unsqueeze(-1)).flatten(-2).to(dtype)


def fake_quantize(x: torch.Tensor, scale_2: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """[..., K] -> the values that NVFP4 with dynamic block scales would hold, same dtype."""
    scales = block_scales(x, scale_2, block)
    factor = (scales.float() * scale_2).unsqueeze(-1)
    scaled = x.unflatten(-1, (-1, block)) / factor
    return round_values(scaled).mul_(factor).flatten(-2).to(x.dtype)


def round_values(scaled: torch.Tensor) -> torch.Tensor:
    """float32 -> nearest E2M1 value, ties to even mantissa."""
    return torch.copysign(round_magnitude(scaled.abs().clamp_(max=E2M1_MAX)), scaled)


def round_magnitude(magnitude: torch.Tensor) -> torch.Tensor:
    """float32 in 0..6 -> nearest E2M1 magnitude, in place.

    Steps are 0.5 below 2, 1 in [2, 4), 2 above: half of the binade's power of two, at least half of one. Adding
    3 * 2**21 binades leaves float32 no finer digit than that step; its own rounding (ties to even) does the work.
    """
    binade = magnitude.clamp(min=1.0).view(torch.int32).bitwise_and_(_EXPONENT).view(torch.float32)
    shift = binade.mul_(3.0 * 2.0**21)
    return magnitude.add_(shift).sub_(shift)


_EXPONENT = 0x7F800000
"""Exponent bits of a float32."""
