"""Fake quantization in the arithmetic of what ships, on any device, registered with ModelOpt.

Two reasons for a backend of our own (``register_quant_backend`` is ModelOpt's public hook):

- ModelOpt's kernels for dynamic blocks need CUDA (``amax must be a CUDA tensor``, ``modelopt_cuda_ext_mx``).
- For scales of channels and of static blocks its fake quantization multiplies by a reciprocal where its exporter
  divides. On exact ties, a weight in a hundred in bf16, the two round to different codes: what is evaluated in memory
  would not be what ships. For one FP8 scale it multiplies the codes by 1 / (448 / amax), a runtime by the stored
  amax / 448: where that is exact, products lie in the middle of two bf16 numbers and round apart.

The arithmetic is that of our codecs, which are bit-exact with ModelOpt's packing.
"""

from __future__ import annotations

from typing import Any

import torch

from toolchain.codecs import compiled, e2m1, fp8, mx
from toolchain.codecs.base import scales_of
from toolchain.core.errors import ToolchainError

NAME = "toolchain"
E2M1, E4M3, E8M0 = (2, 1), (4, 3), (8, 0)
BY_RANGE = {"codes": "range"}
"""``backend_extra_args`` of FP8 weights with one scale: codes follow the range itself, as ``codecs/fp8.py`` packs them.
Inputs are rounded under the range that a runtime has, stored scale * 448, which may differ in its last place."""
FP8_RANGE = {"range": "fp8"}
"""``backend_extra_args`` of NVFP4 quantizers whose kernels expand blocks to E4M3: scale amax / 448, not amax / 2688."""
CURRENT_RANGE = {"range": "current"}
"""``backend_extra_args`` of weights that are trained: ranges of channels and static blocks are those of the tensor that
is given, as packing will take them, and not those that calibration saw (``current_ranges.py``)."""


def register() -> None:
    """Make the backend known to ModelOpt; once per process is enough, more does no harm."""
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    if not tensor_quantizer.is_registered_quant_backend(NAME):
        tensor_quantizer.register_quant_backend(NAME, _fake_quantize)


def adapt(settings: dict[str, Any], *, stored: bool = False) -> dict[str, Any]:
    """Quantizer settings of a preset, pointed at the backend.

    ``stored``: of a weight whose codes the checkpoint holds; those of inputs are made from the stored scale.
    """
    blocks = settings.get("block_sizes") or {}
    adapted = {**settings, "backend": NAME}
    if stored and _bits(settings) == E4M3 and not blocks and settings.get("axis") is None:
        adapted["backend_extra_args"] = BY_RANGE
    if tuple(blocks.get("scale_bits") or ()) == E8M0:
        # No scale per tensor: without this, ModelOpt's calibration collects one and its exporter writes it.
        adapted["type"] = "dynamic"
    elif _bits(settings) == E2M1 and blocks.get(-1) != e2m1.BLOCK:
        adapted["backend_extra_args"] = FP8_RANGE
    return adapted


def _bits(settings: dict[str, Any]) -> Any:
    bits = settings["num_bits"]
    return tuple(bits) if isinstance(bits, list | tuple) else bits


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
    blocks = quantizer.block_sizes or {}
    if blocks.get("type") == "dynamic":
        return _round_dynamic_blocks(inputs, quantizer, blocks)
    if quantizer.num_bits == E4M3 and quantizer._dynamic:
        return fp8.fake_quantize_tokens(inputs)
    # Static scales, already shaped to the inputs: of a tensor, of channels, or of blocks that ModelOpt has unfolded.
    if quantizer.backend_extra_args == CURRENT_RANGE:
        amax = range_of(inputs, quantizer.axis)
    else:
        amax = quantizer.amax if quantizer.amax is not None else inputs.abs().amax()
    if quantizer._use_constant_amax:  # fp8_cast: ModelOpt takes 448, a scale of 1, and keeps no buffer for it
        amax = torch.tensor(fp8.E4M3_MAX)
    scale = scales_of(amax.to(inputs.device), quantizer.maxbound)
    if quantizer.num_bits == E4M3 and quantizer.axis is None and not blocks:
        if quantizer.backend_extra_args:
            codes = fp8.encode(inputs, amax.to(inputs.device).float())
            return (codes.float() * scale).to(inputs.dtype)
        return fp8.fake_quantize(inputs, scale)
    if quantizer.num_bits == E4M3:
        return (fp8.divide(inputs, scale).float() * scale).to(inputs.dtype)
    largest = int(quantizer.maxbound)
    return ((inputs.float() / scale).round_().clamp_(-largest - 1, largest) * scale).to(inputs.dtype)


def range_of(inputs: torch.Tensor, axis: int | tuple[int, ...]) -> torch.Tensor:
    """Largest magnitudes of ``inputs`` over all dimensions but ``axis``, which keep their place (size 1)."""
    kept = {index % inputs.dim() for index in ((axis,) if isinstance(axis, int) else axis)}
    return inputs.abs().amax([index for index in range(inputs.dim()) if index not in kept], keepdim=True)


def _round_dynamic_blocks(inputs: torch.Tensor, quantizer: Any, blocks: dict[Any, Any]) -> torch.Tensor:
    kind = (quantizer.num_bits, blocks.get("scale_bits"))
    if kind == (E2M1, E4M3):
        amax = quantizer.amax if quantizer.amax is not None else inputs.abs().amax()
        scale = e2m1.global_scale_fp8 if quantizer.backend_extra_args else e2m1.global_scale
        scale_2 = scale(amax.to(inputs.device))
        found = compiled.fake_nvfp4(inputs, scale_2, blocks[-1])
        return e2m1.fake_quantize(inputs, scale_2, blocks[-1]) if found is None else found
    if kind == (E2M1, E8M0):
        return mx.fake_quantize_fp4(inputs)
    if kind == (E4M3, E8M0):
        return mx.fake_quantize_fp8(inputs)
    if kind == (E4M3, None):
        return fp8.fake_quantize_groups(inputs, blocks[-1])
    raise ToolchainError(f"no arithmetic here for dynamic blocks of {quantizer.num_bits}, scales {kind[1]}")
