"""FP8 E4M3 with one scale per tensor (W8A8), and the FP8 roundings of activations.

The arithmetic is that of ModelOpt's fake quantization (``tensor_quant.fp8_eager``): multiply by 448 / amax in float32,
round once. ModelOpt's exporter divides by the scale in the weight's dtype instead, which rounds a bf16 weight twice: on
about one weight in a hundred it stores the neighbouring code of the one that was evaluated. We store the evaluated one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from toolchain.codecs.base import Calibrated, usable_amax
from toolchain.formats.fp8 import FP8

E4M3_MAX = 448.0


def encode(x: torch.Tensor, amax: torch.Tensor | float) -> torch.Tensor:
    """x -> E4M3 of x * (448 / amax), saturating. Torch's own cast would give NaN above 448."""
    return (x.float() * (E4M3_MAX / amax)).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x -> E4M3 of x / scale in float32, saturating: the packing of formats with many scales per tensor, where
    ModelOpt's exporter rounds once, too."""
    return (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x rounded to E4M3 multiples of ``scale``; same dtype. ``scale * 448`` gives back the amax it was made of."""
    return (encode(x, scale * E4M3_MAX).float() * scale).to(x.dtype)


def fake_quantize_tokens(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> rounded to E4M3 under one dynamic scale per token, amax / 448; same dtype."""
    amax = usable_amax(x.abs().amax(-1, keepdim=True))
    return (encode(x, amax).float() * (amax / E4M3_MAX)).to(x.dtype)


def fake_quantize_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., K] -> the same with one dynamic scale per ``size`` elements of a token; the last group may be shorter."""
    width = x.shape[-1]
    groups = pad(x, (0, -width % size)).unflatten(-1, (-1, size))
    return fake_quantize_tokens(groups).flatten(-2)[..., :width]


class Fp8Codec:
    format = FP8

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        amax = calibrated.tensor_amax(weight)
        return {
            "weight": encode(weight, amax),
            "weight_scale": amax / E4M3_MAX,
            "input_scale": calibrated.require_input_amax(self.format) / E4M3_MAX,
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return (tensors["weight"].float() * tensors["weight_scale"]).to(dtype)

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return fake_quantize(x, tensors["input_scale"])
