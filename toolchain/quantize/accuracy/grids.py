"""The numbers that a format can store for weights: element values, and the scales that it may choose from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from toolchain.codecs import compiled, e2m1, int4_awq, mx
from toolchain.formats import get_format
from toolchain.quantize.accuracy import grids8

WINDOW = (0, 1, 2, 3, 4, 5, -1, -2)
"""E4M3 codes around amax/6, likeliest first: a simulation over Gaussian, Laplace and t4 weights found the least squared
error within them for nearly all blocks."""
CLIP_RATIOS = tuple(1.0 - 0.05 * step for step in range(11))
"""Shares of the range that AWQ's clipping tries (ModelOpt ``awq_clip``: shrink_step 0.05, min_clip_ratio 0.5)."""
LARGEST_CODE = 126
"""Of E4M3: 0x7E is 448, 0x7F is NaN."""


class Grid(Protocol):
    group: int
    """Elements of in_features under one scale."""

    def base(self, weight: torch.Tensor) -> torch.Tensor:
        """[N, K] of one Linear -> scales [N, ceil(K/group)], from the largest magnitude."""

    def factors(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales -> float32 factor of one element step."""

    def stored(self, scales: torch.Tensor) -> torch.Tensor | None:
        """Scales of one Linear as its codec takes them; None where they follow from the amax alone."""

    def round(self, scaled: torch.Tensor) -> torch.Tensor:
        """Unscaled float32 values -> the nearest that the elements hold, as a new tensor."""

    def candidates(self, weight: torch.Tensor, method: str) -> Iterator[torch.Tensor]:
        """Scales [N, K/group] to try for ``method``, the plain ones first."""


class Nvfp4Grid:
    def __init__(self, scale_2: torch.Tensor, group: int = e2m1.BLOCK) -> None:
        self.scale_2, self.group = scale_2, group

    def base(self, weight: torch.Tensor) -> torch.Tensor:
        found = compiled.block_scales(weight, self.scale_2, self.group)
        return e2m1.block_scales(weight, self.scale_2, self.group) if found is None else found

    def factors(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.float() * self.scale_2

    def stored(self, scales: torch.Tensor) -> torch.Tensor | None:
        return scales

    def round(self, scaled: torch.Tensor) -> torch.Tensor:
        return e2m1.round_values(scaled)

    def candidates(self, weight: torch.Tensor, method: str) -> Iterator[torch.Tensor]:
        base = self.base(weight)
        yield base
        if method == "four_over_six":
            # A largest code of 4 instead of 6: the scale grows by half.
            larger = base.float() * 1.5
            yield larger.clamp_(max=e2m1.E4M3_MAX).to(torch.float8_e4m3fn)
            return
        codes = base.view(torch.uint8).int()
        for offset in WINDOW[1:]:
            yield (codes + offset).clamp_(1, LARGEST_CODE).to(torch.uint8).view(torch.float8_e4m3fn)


class Int4Grid:
    group = int4_awq.GROUP

    def base(self, weight: torch.Tensor) -> torch.Tensor:
        return int4_awq.group_scales(weight)

    def factors(self, scales: torch.Tensor) -> torch.Tensor:
        return scales

    def stored(self, scales: torch.Tensor) -> torch.Tensor | None:
        return scales

    def round(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round().clamp_(-8, 7)

    def candidates(self, weight: torch.Tensor, method: str) -> Iterator[torch.Tensor]:
        base = self.base(weight)
        for ratio in CLIP_RATIOS:
            yield base * ratio


class Mxfp4Grid:
    group = mx.BLOCK

    def base(self, weight: torch.Tensor) -> torch.Tensor:
        return mx.stored_scales(mx.exponents(weight, e2m1.E2M1_MAX))

    def factors(self, scales: torch.Tensor) -> torch.Tensor:
        return mx.factors(scales)

    def stored(self, scales: torch.Tensor) -> torch.Tensor | None:
        return scales

    def round(self, scaled: torch.Tensor) -> torch.Tensor:
        return e2m1.round_values(scaled)

    def candidates(self, weight: torch.Tensor, method: str) -> Iterator[torch.Tensor]:
        """The exponent that saturates nothing, and the one below: it may lose at the top and win the rest."""
        base = self.base(weight)
        yield base
        yield torch.where(base > 0, base - 1, base)


def grid_of(format_name: str, weight_amax: torch.Tensor, width: int) -> Grid:
    """The grid of a format's weights; ``weight_amax`` (float32 scalar) is that of all fused siblings, ``width`` their
    in_features."""
    group = get_format(format_name).group_size
    if format_name in ("nvfp4", "w4a16_nvfp4"):
        return Nvfp4Grid(e2m1.global_scale(weight_amax))
    if format_name == "w4a8_nvfp4_fp8":
        return Nvfp4Grid(e2m1.global_scale_fp8(weight_amax), group or e2m1.BLOCK)
    if format_name in ("int4_awq", "int4_gptq", "w4a8_awq"):
        return Int4Grid()
    if format_name in ("int8_sq", "int8_wo"):
        return grids8.Int8Grid(width)
    if format_name == "fp8":
        return grids8.Fp8TensorGrid(weight_amax, width)
    if format_name == "fp8_per_channel_per_token":
        return grids8.Fp8ChannelGrid(width)
    others: dict[str, Grid] = {
        "fp8_block": grids8.Fp8BlockGrid(),
        "mxfp4": Mxfp4Grid(),
        "mxfp8": grids8.Mxfp8Grid(),
    }
    return others[format_name]
