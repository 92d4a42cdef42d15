"""Fake quantization with dynamic blocks on any device, registered with ModelOpt.

ModelOpt's own kernels for these need CUDA (``amax must be a CUDA tensor``, ``modelopt_cuda_ext_mx``).
``register_quant_backend`` is its public hook; the arithmetic is that of our codecs, which are bit-exact with ModelOpt's
packing, so the model in memory computes on the numbers that ship.
"""

from __future__ import annotations

from typing import Any

import torch

from toolchain.codecs import e2m1, fp8, mx
from toolchain.core.errors import ToolchainError

NAME = "toolchain"
E2M1, E4M3, E8M0 = (2, 1), (4, 3), (8, 0)
FP8_RANGE = {"range": "fp8"}
"""``backend_extra_args`` of NVFP4 quantizers whose kernels expand blocks to E4M3: scale amax / 448, not amax / 2688."""


def register() -> None:
    """Make the backend known to ModelOpt; once per process is enough, more does no harm."""
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    if not tensor_quantizer.is_registered_quant_backend(NAME):
        tensor_quantizer.register_quant_backend(NAME, _fake_quantize)


def adapt(settings: dict[str, Any]) -> dict[str, Any]:
    """Quantizer settings of a preset, pointed at the backend where ModelOpt itself would need CUDA."""
    blocks = settings.get("block_sizes") or {}
    if blocks.get("type") != "dynamic":
        return settings
    adapted = {**settings, "backend": NAME}
    if tuple(blocks.get("scale_bits") or ()) == E8M0:
        # No scale per tensor: without this, ModelOpt's calibration collects one and its exporter writes it.
        adapted["type"] = "dynamic"
    elif tuple(settings["num_bits"]) == E2M1 and blocks.get(-1) != e2m1.BLOCK:
        adapted["backend_extra_args"] = FP8_RANGE
    return adapted


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
        return _round(inputs, quantizer)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def _fake_quantize(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Entry point that ModelOpt calls: inputs [..., K]; the quantizer holds settings and the calibrated ``amax``."""
    return _StraightThrough.apply(inputs, quantizer)


def _round(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    blocks = quantizer.block_sizes
    kind = (quantizer.num_bits, blocks.get("scale_bits"))
    if kind == (E2M1, E4M3):
        amax = quantizer.amax if quantizer.amax is not None else inputs.abs().amax()
        scale = e2m1.global_scale_fp8 if quantizer.backend_extra_args else e2m1.global_scale
        return e2m1.fake_quantize(inputs, scale(amax.to(inputs.device)), blocks[-1])
    if kind == (E2M1, E8M0):
        return mx.fake_quantize_fp4(inputs)
    if kind == (E4M3, E8M0):
        return mx.fake_quantize_fp8(inputs)
    if kind == (E4M3, None):
        return fp8.fake_quantize_groups(inputs, blocks[-1])
    raise ToolchainError(f"no CPU arithmetic for dynamic blocks of {quantizer.num_bits}, scales {kind[1]}")
