"""FP8 E4M3 with one scale per 128 x 128 weights; activations in dynamic groups of 128 per token.

Rows and columns beyond the last whole block have a block of their own: scales are [ceil(out/128), ceil(in/128)], as
TensorRT-LLM's FP8BlockScalesLinearMethod allocates them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from toolchain.codecs import fp8
from toolchain.codecs.base import Calibrated, scales_of
from toolchain.formats.fp8_block import BLOCK, FP8_BLOCK


def block_scales(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> float32 [ceil(out/128), ceil(in/128)]: amax / 448; 1 for a block of zeros."""
    rows, columns = weight.shape
    padded = pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    return scales_of(blocks.abs().amax(dim=(1, 3)), fp8.E4M3_MAX)


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[ceil(out/128), ceil(in/128)] -> [out, in]: each element's own scale."""
    rows = scales.repeat_interleave(BLOCK, 0)[: shape[0]]
    return rows.repeat_interleave(BLOCK, 1)[:, : shape[1]]


class Fp8BlockCodec:
    format = FP8_BLOCK

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        scales = calibrated.weight_scale
        if scales is None:
            scales = block_scales(weight)
        return {"weight": fp8.divide(weight, spread(scales, weight.shape)), "weight_scale_inv": scales}

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        scales = tensors.get("weight_scale_inv")
        if scales is None:  # ModelOpt's name for it; its shape is [rows, 1, columns, 1]
            scales = tensors["weight_scale"]
        if scales.dim() == 4:
            scales = scales.squeeze(3).squeeze(1)
        weight = tensors["weight"]
        return (weight.float() * spread(scales.float(), weight.shape)).to(dtype)

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return fp8.fake_quantize_groups(x, BLOCK)
