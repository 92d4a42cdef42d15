"""ModelOpt's two NVFP4 kernels in plain torch, put where ModelOpt calls them: its presets run unchanged on a CPU.

Not the toolchain's own emulation: the peer is measured without our code. Both are checked against ModelOpt's packing
(``NVFP4QTensor``) by ``check``. Facts: block scale = amax / 6 under a tensor scale amax / (6 * 448), rounded to E4M3;
E2M1 rounds to nearest, ties to the even mantissa (ModelOpt 0.47 ``qtensor/nvfp4_tensor.py``,
``kernels/quantization/gemm/fp4_kernel.py``).
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK, E2M1_MAX, E4M3_MAX, E4M3_TINY = 16, 6.0, 448.0, 2.0**-9


def install() -> None:
    """Replace the CUDA-only functions in the module that calls them; once per process."""
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    tensor_quantizer.dynamic_block_quant = _dynamic
    tensor_quantizer.static_blockwise_fp4_fake_quant = _static


def _dynamic(
    inputs: torch.Tensor,
    block_size: int,
    amax: torch.Tensor,
    bias: Any,
    num_bits: Any,
    scale_bits: Any,
    *others: Any,
) -> torch.Tensor:
    if tuple(num_bits) != (2, 1) or tuple(scale_bits) != (4, 3) or block_size != BLOCK or bias is not None:
        raise NotImplementedError(f"dynamic blocks of {block_size}, {num_bits} bits, scales {scale_bits}")
    tensor_scale = amax.float().amax() / (E2M1_MAX * E4M3_MAX)
    blocks = inputs.float().unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / (E2M1_MAX * tensor_scale)
    scales = torch.where(scales == 0, 1.0, scales).clamp(E4M3_TINY, E4M3_MAX)
    scales = scales.to(torch.float8_e4m3fn).float() * tensor_scale
    return (round_e2m1(blocks / scales) * scales).flatten(-2).to(inputs.dtype)


def _static(
    x: torch.Tensor,
    amax: torch.Tensor,
    global_amax: torch.Tensor | None = None,
    quantize_block_scales: bool = True,
    fp8_max: float = E4M3_MAX,
    out_dtype: torch.dtype | None = None,
    pass_through_bwd: bool = False,
) -> torch.Tensor:
    scales = amax.float() / E2M1_MAX
    if quantize_block_scales:
        largest = amax.float().amax() if global_amax is None else global_amax.float()
        tensor_scale = largest / (E2M1_MAX * fp8_max)
        scales = (scales / tensor_scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * tensor_scale
    scales = scales.reshape(-1, 1)
    blocks = x.float().reshape(len(scales), -1)
    safe = torch.where(scales == 0, 1.0, scales)
    rounded = torch.where(scales == 0, 0.0, round_e2m1(blocks / safe) * safe)
    return rounded.view(x.shape).to(out_dtype or x.dtype)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; a power of two per binade makes ties even."""
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    step = torch.where(magnitude >= 2.0, torch.where(magnitude >= 4.0, 2.0, 1.0), 0.5)
    return torch.copysign((magnitude / step).round_() * step, x)


def check() -> None:
    """SystemExit unless both functions give what ModelOpt's own packing gives back, bit for bit."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) ** 3
    weight[0, :BLOCK] = 0
    amax = weight.abs().amax()
    packed, scale, scale_2 = NVFP4QTensor.quantize(weight, BLOCK)
    expected = packed.dequantize(
        scale=scale, double_scale=scale_2, block_sizes={-1: BLOCK}, dtype=torch.float32
    )
    block_amax = weight.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    for got in (_dynamic(weight, BLOCK, amax, None, (2, 1), (4, 3)), _static(weight, block_amax, amax)):
        if not torch.equal(got, expected):
            raise SystemExit(f"NVFP4 on CPU is not ModelOpt's: off by {float((got - expected).abs().max())}")


if __name__ == "__main__":
    check()
    print("bit-exact with NVFP4QTensor")
