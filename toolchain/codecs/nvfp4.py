"""NVFP4 (W4A4): packed E2M1 weights, dynamic block scales for activations under a calibrated ``input_scale``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolchain.codecs import e2m1
from toolchain.codecs.base import Calibrated
from toolchain.core.errors import ToolchainError
from toolchain.formats.nvfp4 import NVFP4


class Nvfp4Codec:
    format = NVFP4

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        if calibrated.input_amax is None:
            raise ToolchainError("NVFP4 needs the calibrated amax of the input", code="TC-202")
        amax = calibrated.weight_amax if calibrated.weight_amax is not None else weight.abs().amax()
        scale_2 = e2m1.global_scale(amax.to(weight.device))
        scales = e2m1.block_scales(weight, scale_2)
        return {
            "weight": e2m1.pack_nibbles(e2m1.encode(weight, scales, scale_2)),
            "weight_scale": scales,
            "weight_scale_2": scale_2,
            "input_scale": e2m1.global_scale(calibrated.input_amax),
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        codes = e2m1.unpack_nibbles(tensors["weight"])
        return e2m1.decode(codes, tensors["weight_scale"], tensors["weight_scale_2"], dtype)

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return e2m1.fake_quantize(x, tensors["input_scale"])
