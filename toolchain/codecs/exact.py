"""MXFP4 numbers as NVFP4 numbers, exactly where E4M3 reaches.

Both have E2M1 elements. A block of 32 under 2^e becomes two blocks of 16 under an E4M3 scale that is a power of two:
E4M3 holds 2^-9 .. 2^8 exactly, so under a ``weight_scale_2`` of 2^(largest e - 8), blocks whose e is at most 17 below
the largest keep their codes. ModelOpt's MXFP4 to NVFP4 cast pins block maxima to the same end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from toolchain.codecs import e2m1, mx

TOP, REACH = 8, 17
"""Largest power of two in E4M3, and how far below it the smallest (subnormal) one is."""


@dataclass(frozen=True, kw_only=True)
class Cast:
    tensors: dict[str, torch.Tensor]
    """``weight`` U8 [out, in/2], ``weight_scale`` E4M3 [out, in/16], ``weight_scale_2`` float32 scalar."""
    blocks: int
    """MXFP4 blocks of the matrix."""
    requantized: int
    """Of them those that E4M3 does not reach: their codes were rounded again."""


def largest_exponent(weight: torch.Tensor, scale: torch.Tensor) -> int:
    """Largest E8M0 byte of blocks that are not all zero, or 0. ``weight`` U8 [.., in/2], ``scale`` [.., in/32]."""
    return int(torch.where(_is_used(weight), scale.int(), 0).max())


def nvfp4_of_mxfp4(weight: torch.Tensor, scale: torch.Tensor, largest: int) -> Cast:
    """MXFP4 ``weight`` U8 [out, in/2] and ``scale`` [out, in/32]; ``largest`` among all that share a scale_2."""
    scale_2 = torch.tensor(2.0 ** (largest - mx.BIAS - TOP), dtype=torch.float32, device=weight.device)
    used = _is_used(weight)
    below = largest - scale.int()
    far = used & (below > REACH)
    # Any scale will do for a block of zeros; its codes keep their signs.
    exponent = TOP - torch.where(used, below, 0).clamp(0, REACH)
    scales = torch.exp2(exponent.float()).repeat_interleave(2, dim=-1).to(torch.float8_e4m3fn)
    codes = e2m1.unpack_nibbles(weight)
    if far.any():
        values = mx.decode(e2m1.values_of(codes), scale, torch.float32)
        again = e2m1.encode(values, scales, scale_2)
        codes = torch.where(far.repeat_interleave(mx.BLOCK, dim=-1), again, codes)
    packed = e2m1.pack_nibbles(codes)
    return Cast(
        tensors={"weight": packed, "weight_scale": scales, "weight_scale_2": scale_2},
        blocks=scale.numel(),
        requantized=int(far.sum()),
    )


def _is_used(weight: torch.Tensor) -> torch.Tensor:
    """[.., in/2] -> [.., in/32]: blocks with a code other than zero."""
    return ((weight & 0x77) != 0).unflatten(-1, (-1, mx.BLOCK // 2)).any(-1)
