"""Grids of eight bits: their scales follow from the largest magnitude, and there is nothing to search; codes can be
chosen all the same (``gptq``)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from toolchain.codecs import e2m1, fp8, fp8_block, int8, mx
from toolchain.codecs.base import scales_of, usable_amax


class _E4m3:
    group: int

    def base(self, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def factors(self, scales: torch.Tensor) -> torch.Tensor:
        return scales

    def stored(self, scales: torch.Tensor) -> torch.Tensor | None:
        return scales

    def round(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.clamp(-fp8.E4M3_MAX, fp8.E4M3_MAX).to(torch.float8_e4m3fn).float()

    def candidates(self, weight: torch.Tensor, method: str) -> Iterator[torch.Tensor]:
        yield self.base(weight)


class Fp8TensorGrid(_E4m3):
    """One scale for the tensor and its fused siblings; the codec makes it of the amax."""

    def __init__(self, amax: torch.Tensor, width: int) -> None:
        self._scale, self.group = usable_amax(amax) / fp8.E4M3_MAX, width

    def base(self, weight: torch.Tensor) -> torch.Tensor:
        return self._scale.to(weight.device).expand(len(weight), 1)

    def stored(self, scales: torch.Tensor) -> torch.Tensor | None:
        return None


class Fp8ChannelGrid(_E4m3):
    def __init__(self, width: int) -> None:
        self.group = width

    def base(self, weight: torch.Tensor) -> torch.Tensor:
        return scales_of(weight.abs().amax(-1, keepdim=True), fp8.E4M3_MAX)

    def stored(self, scales: torch.Tensor) -> torch.Tensor | None:
        return scales[:, 0]


class Fp8BlockGrid(_E4m3):
    """Every row holds the scales of its block of 128."""

    group = fp8_block.BLOCK

    def base(self, weight: torch.Tensor) -> torch.Tensor:
        return fp8_block.block_scales(weight).repeat_interleave(self.group, 0)[: len(weight)]

    def stored(self, scales: torch.Tensor) -> torch.Tensor | None:
        return scales[:: self.group].contiguous()


class Mxfp8Grid(_E4m3):
    group = mx.BLOCK

    def base(self, weight: torch.Tensor) -> torch.Tensor:
        return mx.stored_scales(mx.exponents(weight, e2m1.E4M3_MAX))

    def factors(self, scales: torch.Tensor) -> torch.Tensor:
        return mx.factors(scales)


class Int8Grid(Fp8ChannelGrid):
    def base(self, weight: torch.Tensor) -> torch.Tensor:
        return scales_of(weight.abs().amax(-1, keepdim=True), int8.INT8_MAX)

    def round(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round().clamp_(-128, 127)
