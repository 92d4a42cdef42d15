"""INT4: symmetric integers -8..7, FP32 scale per 128 input channels, channel scales on the input (W4A16); and the same
weights expanded to FP8 (W4A8)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolchain.codecs import fp8
from toolchain.codecs.base import Calibrated
from toolchain.formats.base import Format
from toolchain.formats.int4_awq import INT4_AWQ
from toolchain.formats.int4_gptq import INT4_GPTQ
from toolchain.formats.w4a8_awq import W4A8_AWQ

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


def pack_rows(values: torch.Tensor) -> torch.Tensor:
    """[out, in] int8 values -8..7 -> [out/2, in] bytes, even output channels in the low nibble."""
    nibbles = values.view(torch.uint8) & 0x0F
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of ``pack_rows``."""
    nibbles = torch.stack((packed & 0x0F, packed >> 4), dim=1).flatten(0, 1)
    return (nibbles.to(torch.int8) ^ 8) - 8


def decode(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int8 values [out, in] with their scales -> float32."""
    return values.unflatten(-1, (-1, GROUP)).mul(scales.unsqueeze(-1)).flatten(-2)


def fake_quantize(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> float32 values that INT4 with groups of 128 would hold."""
    scales = group_scales(weight)
    return decode(encode(weight, scales), scales)


class Int4AwqCodec:
    """``int4_awq`` and ``int4_gptq``: one layout, numbers chosen in two ways."""

    def __init__(self, format: Format = INT4_AWQ) -> None:
        self.format = format

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        scales = group_scales(weight) if calibrated.weight_scale is None else calibrated.weight_scale
        return {
            "weight": pack_rows(encode(weight, scales)),
            "weight_scale": scales,
            **calibrated.stored_pre_quant_scale(),
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return decode(unpack_rows(tensors["weight"]), tensors["weight_scale"]).to(dtype)

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return x


class W4A8AwqCodec(Int4AwqCodec):
    """The kernel computes on integer * (weight_scale / weight_scale_2), rounded to E4M3 (W4A8_AWQ_LinearMethod)."""

    def __init__(self) -> None:
        super().__init__(W4A8_AWQ)

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        return {
            **super().pack(weight, calibrated),
            "weight_scale_2": calibrated.tensor_amax(weight) / fp8.E4M3_MAX,
            "input_scale": calibrated.require_input_amax(self.format) / fp8.E4M3_MAX,
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return fp8.fake_quantize(super().unpack(tensors, dtype), tensors["weight_scale_2"])

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return fp8.fake_quantize(x, tensors["input_scale"])


INT4_CODECS = (Int4AwqCodec(), Int4AwqCodec(INT4_GPTQ), W4A8AwqCodec())
