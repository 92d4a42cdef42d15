"""NVFP4 in one pass over the weights, compiled for this CPU by numba: torch takes some twenty.

The numbers are those of ``e2m1.py``, bit for bit (tests/test_compiled.py): each division and rounding is IEEE's in
float32, and in the same order. The functions return None, and the caller goes on with torch, where numba is missing, on
other devices, for tensors so small that loading compiled code costs more than it gains, and for tensors whose largest
magnitude is not finite. They release the interpreter lock.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType

import torch

LEAST_ELEMENTS = 1 << 18
"""Below it torch is used: loading takes half a second once per process, and three when nothing is in numba's cache."""
PACKED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pack_nvfp4(
    weight: torch.Tensor, scale_2: torch.Tensor, scales: torch.Tensor | None, block: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """[N, K] and its float32 scale of the tensor -> (uint8 [N, K/2], E4M3 [N, K/block]).

    ``scales`` [N, K/block] where they are decided already; None: amax / 6 of each block.
    """
    covered = weight.dim() == 2 and weight.dtype in PACKED_DTYPES and _is_worth(weight)
    if not covered or weight.shape[1] % block or block % 2:
        return None
    factor = float(scale_2)
    kernels = load() if math.isfinite(factor) else None
    if kernels is None:
        return None
    rows, columns = weight.shape
    if weight.dtype == torch.bfloat16:
        source, kind = _words(weight), "bf16"
    else:
        source, kind = weight.float().contiguous().numpy(), "f32"
    if scales is None:
        scales = torch.empty(rows, columns // block, dtype=torch.float8_e4m3fn)
        codes = scales.view(torch.uint8).numpy()
        getattr(kernels, f"scales_{kind}")(source, kernels.float32(factor), codes)
    else:
        codes = scales.contiguous().view(torch.uint8).numpy()
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    getattr(kernels, f"codes_{kind}")(source, codes, kernels.float32(factor), packed.numpy())
    return packed, scales


def largest_magnitude(weight: torch.Tensor) -> torch.Tensor:
    """Largest magnitude as float32 (0-dim, on the tensor's device); NaN where it holds one."""
    if weight.dtype == torch.bfloat16 and weight.numel() % 2 == 0 and _is_worth(weight):
        kernels = load()
        if kernels is not None:
            found = int(kernels.largest_bf16(_words(weight.reshape(1, -1))[0]))
            return torch.tensor(found, dtype=torch.int32).view(torch.float32)
    return weight.abs().amax().float()


def dequantize_fp8(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """E4M3 [N, K] times its float32 scales [ceil(N/rows), ceil(K/columns)] in blocks, rounded to bfloat16 [N, K]."""
    kernels = load() if codes.dim() == 2 and _is_worth(codes) else None
    if kernels is not None:
        out = torch.empty(codes.shape, dtype=torch.bfloat16)
        bits = out.view(torch.int16).numpy().view("u2")
        kernels.dequantize(
            codes.contiguous().view(torch.uint8).numpy(), scales.contiguous().numpy(), *block, bits
        )
        return out
    rows, columns = block
    spread = scales.repeat_interleave(rows, 0)[: len(codes)]
    spread = spread.repeat_interleave(columns, 1)[:, : codes.shape[1]]
    return (codes.float() * spread).to(torch.bfloat16)


def _words(weight: torch.Tensor):  # type: ignore[no-untyped-def]  # numpy is imported with torch
    """bfloat16 [N, K] -> uint32 array [N, K/2]."""
    return weight.contiguous().view(torch.int32).numpy().view("u4")


def _is_worth(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() >= LEAST_ELEMENTS


@functools.cache
def load() -> ModuleType | None:
    """``codecs/kernels.py``, or None where numba does not work here or is told not to compile."""
    try:
        import numba
    except ImportError:
        return None
    if numba.config.DISABLE_JIT:
        return None
    from toolchain.codecs import kernels

    return kernels
