"""MXFP4 weights (W4A16), and MXFP8 weights and activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolchain.codecs import e2m1, mx
from toolchain.codecs.base import Calibrated
from toolchain.formats.mxfp4 import MXFP4
from toolchain.formats.mxfp8 import MXFP8


class Mxfp4Codec:
    format = MXFP4

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        scales = calibrated.weight_scale
        if scales is None:
            scales = mx.stored_scales(mx.exponents(weight, e2m1.E2M1_MAX))
        return {"weight": mx.pack_fp4(weight, scales.float() - mx.BIAS), "weight_scale": scales}

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        values = e2m1.values_of(e2m1.unpack_nibbles(tensors["weight"]))
        return mx.decode(values, tensors["weight_scale"], dtype)

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return x


class Mxfp8Codec:
    format = MXFP8

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        scales = calibrated.weight_scale
        if scales is None:
            scales = mx.stored_scales(mx.exponents(weight, e2m1.E4M3_MAX))
        codes = mx.encode_fp8(weight, scales.float() - mx.BIAS)
        return {"weight": codes, "weight_scale": scales}

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return mx.decode(tensors["weight"].float(), tensors["weight_scale"], dtype)

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return mx.fake_quantize_fp8(x)
