"""FP8 E4M3 with one scale per tensor (W8A8)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolchain.codecs.base import Calibrated
from toolchain.core.errors import ToolchainError
from toolchain.formats.fp8 import FP8

E4M3_MAX = 448.0


def fake_quantize(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x -> round(x / scale) to E4M3, saturating, times scale; same dtype. Torch's own cast would give NaN above 448."""
    scaled = (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX)
    return (scaled.to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


class Fp8Codec:
    format = FP8

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        if calibrated.input_amax is None:
            raise ToolchainError("FP8 needs the calibrated amax of the input", code="TC-202")
        amax = calibrated.weight_amax if calibrated.weight_amax is not None else weight.abs().amax()
        scale = amax.to(weight.device).float() / E4M3_MAX
        scaled = (weight.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX)
        return {
            "weight": scaled.to(torch.float8_e4m3fn),
            "weight_scale": scale,
            "input_scale": calibrated.input_amax.float() / E4M3_MAX,
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return (tensors["weight"].float() * tensors["weight_scale"]).to(dtype)

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return fake_quantize(x, tensors["input_scale"])
