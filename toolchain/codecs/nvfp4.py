"""NVFP4: packed E2M1 weights; with it NVFP4 activations (W4A4), FP8 ones (W4A8) or none (W4A16)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolchain.codecs import compiled, e2m1, fp8
from toolchain.codecs.base import Calibrated
from toolchain.formats.base import Format
from toolchain.formats.nvfp4 import NVFP4
from toolchain.formats.w4a8_nvfp4_fp8 import W4A8_NVFP4_FP8
from toolchain.formats.w4a16_nvfp4 import W4A16_NVFP4


class _Nvfp4Weights:
    format: Format

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        scale_2 = self.weight_scale_2(calibrated.tensor_amax(weight))
        scales = calibrated.weight_scale
        block = self.format.group_size or e2m1.BLOCK
        made = compiled.pack_nvfp4(weight, scale_2, scales, block)
        if made is not None:
            packed, scales = made
        else:
            if scales is None:
                scales = e2m1.block_scales(weight, scale_2, block)
            packed = e2m1.pack_nibbles(e2m1.encode(weight, scales, scale_2))
        return {"weight": packed, "weight_scale": scales, "weight_scale_2": scale_2}

    def weight_scale_2(self, amax: torch.Tensor) -> torch.Tensor:
        return e2m1.global_scale(amax)

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        codes = e2m1.unpack_nibbles(tensors["weight"])
        return e2m1.decode(codes, tensors["weight_scale"], tensors["weight_scale_2"], dtype)


class Nvfp4Codec(_Nvfp4Weights):
    format = NVFP4

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        amax = calibrated.require_input_amax(self.format)
        return {**super().pack(weight, calibrated), "input_scale": e2m1.global_scale(amax)}

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return e2m1.fake_quantize(x, tensors["input_scale"])


class W4A16Nvfp4Codec(_Nvfp4Weights):
    format = W4A16_NVFP4

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return x


class W4A8Nvfp4Fp8Codec(_Nvfp4Weights):
    format = W4A8_NVFP4_FP8

    def weight_scale_2(self, amax: torch.Tensor) -> torch.Tensor:
        return e2m1.global_scale_fp8(amax)

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        amax = calibrated.require_input_amax(self.format)
        return {**super().pack(weight, calibrated), "input_scale": amax / fp8.E4M3_MAX}

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return fp8.fake_quantize(x, tensors["input_scale"])
