"""INT8 weights with one scale per output channel: weights only (W8A16), or with static INT8 inputs (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolchain.codecs.base import Calibrated, scales_of, usable_amax
from toolchain.formats.int8_sq import INT8_SQ
from toolchain.formats.int8_wo import INT8_WO

INT8_MAX = 127.0


class Int8WoCodec:
    format = INT8_WO

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        scales = calibrated.weight_scale
        if scales is None:
            scales = scales_of(weight.abs().amax(-1), INT8_MAX)
        codes = (weight / scales.unsqueeze(-1)).round_().clamp_(-128, 127).to(torch.int8)
        return {"weight": codes, "weight_scale": scales}

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return (tensors["weight"] * tensors["weight_scale"].unsqueeze(-1)).to(dtype)

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return x


class Int8SqCodec(Int8WoCodec):
    format = INT8_SQ

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        amax = usable_amax(calibrated.require_input_amax(self.format))
        return {
            **super().pack(weight, calibrated),
            "input_scale": amax / INT8_MAX,
            **calibrated.stored_pre_quant_scale(),
        }

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale = tensors["input_scale"]
        codes = (x.float() / scale).round_().clamp_(-INT8_MAX - 1, INT8_MAX)
        return (codes * scale).to(x.dtype)
