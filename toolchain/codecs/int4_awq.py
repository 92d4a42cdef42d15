"""INT4 AWQ (W4A16): symmetric integers -8..7, FP32 scale per 128 input channels, channel scales on the input."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolchain.codecs.base import Calibrated
from toolchain.formats.int4_awq import INT4_AWQ

GROUP = 128
INT4_MAX = 7.0


def group_scales(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> float32 scales [out, in/128] = amax / 7; 1 for a group of zeros (nothing to scale)."""
    scales = weight.unflatten(-1, (-1, GROUP)).abs().amax(-1).float() / INT4_MAX
    return scales.masked_fill_(scales == 0, 1.0)


def encode(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[out, in] -> int8 values -8..7."""
    return (
        (weight.unflatten(-1, (-1, GROUP)) / scales.unsqueeze(-1))
        .round_()
        .clamp_(-8, 7)
        .flatten(-2)
        .to(torch.int8)
    )


def fake_quantize(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> float32 values that INT4 with groups of 128 would hold."""
    scales = group_scales(weight)
    return encode(weight, scales).unflatten(-1, (-1, GROUP)).mul(scales.unsqueeze(-1)).flatten(-2)


class Int4AwqCodec:
    format = INT4_AWQ

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        scales = group_scales(weight)
        nibbles = encode(weight, scales).view(torch.uint8) & 0x0F
        tensors = {"weight": nibbles[0::2] | (nibbles[1::2] << 4), "weight_scale": scales}
        if calibrated.pre_quant_scale is not None:
            tensors["pre_quant_scale"] = calibrated.pre_quant_scale
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        packed = tensors["weight"]
        nibbles = torch.stack((packed & 0x0F, packed >> 4), dim=1).flatten(0, 1)
        values = ((nibbles.to(torch.int8) ^ 8) - 8).unflatten(-1, (-1, GROUP))
        return (values * tensors["weight_scale"].unsqueeze(-1)).flatten(-2).to(dtype)

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale = tensors.get("pre_quant_scale")
        return x if scale is None else x * scale.to(x.dtype)
