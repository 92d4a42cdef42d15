"""FP8 E4M3 with one scale per output channel; activations with one dynamic scale per token."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolchain.codecs import fp8
from toolchain.codecs.base import Calibrated, scales_of
from toolchain.formats.fp8_per_channel_per_token import FP8_PER_CHANNEL_PER_TOKEN


class Fp8PerChannelPerTokenCodec:
    format = FP8_PER_CHANNEL_PER_TOKEN

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        scales = calibrated.weight_scale
        if scales is None:
            scales = scales_of(weight.abs().amax(-1), fp8.E4M3_MAX)
        return {"weight": fp8.divide(weight, scales.unsqueeze(-1)), "weight_scale": scales}

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return (tensors["weight"].float() * tensors["weight_scale"].unsqueeze(-1)).to(dtype)

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return fp8.fake_quantize_tokens(x)
