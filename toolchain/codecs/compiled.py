"""NVFP4 and MXFP4 in one pass over the weights, compiled for this CPU by numba: torch takes some twenty.

The numbers are those of ``e2m1.py`` and ``mx.py``, bit for bit (tests/test_compiled.py): each division and rounding is
IEEE's in float32, and in the same order. The functions return None, and the caller goes on with torch, where numba is
missing, on other devices, for tensors so small that loading compiled code costs more than it gains, and for tensors
whose largest magnitude is not finite. They release the interpreter lock.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType

import torch

LEAST_ELEMENTS = 1 << 18
"""Below it torch is used: loading takes half a second once per process, and two when nothing is in numba's cache."""
PACKED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pack_nvfp4(
    weight: torch.Tensor, scale_2: torch.Tensor, scales: torch.Tensor | None, block: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """[N, K] and its float32 scale of the tensor -> (uint8 [N, K/2], E4M3 [N, K/block]).

    ``scales`` [N, K/block] where they are decided already; None: amax / 6 of each block.
    """
    kernels = _kernels_for(weight, scale_2, block)
    if kernels is None:
        return None
    if scales is None:
        scales = block_scales(weight, scale_2, block)
        assert scales is not None
    source, kind = _source(weight)
    packed = torch.empty(len(weight), weight.shape[1] // 2, dtype=torch.uint8)
    codes = scales.contiguous().view(torch.uint8).numpy()
    getattr(kernels, f"codes_{kind}")(source, codes, kernels.float32(float(scale_2)), packed.numpy())
    return packed, scales


def fake_nvfp4(x: torch.Tensor, scale_2: torch.Tensor, block: int) -> torch.Tensor | None:
    """float32 [..., K] -> ``e2m1.fake_quantize``. Also of small tensors once the loops are loaded: a training rounds
    the same ones thousands of times."""
    wanted = (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and scale_2.numel() == 1
        and not x.shape[-1] % block
    )
    if not wanted or not (_is_loaded() or _is_worth(x)) or not math.isfinite(float(scale_2)):
        return None
    kernels = load()
    if kernels is None:
        return None
    # A copy: ``numpy()`` makes a storage one that cannot be resized, as FSDP does with parameters. Rounded into another
    # place: within its own LLVM makes no vectors, which takes six times as long.
    source = x.detach().clone(memory_format=torch.contiguous_format).view(-1, x.shape[-1])
    out = torch.empty_like(source)
    kernels.rounded_f32(source.numpy(), kernels.float32(float(scale_2)), block, out.numpy())
    return out.view(x.shape)


def learned_nvfp4(
    blocks: torch.Tensor, pre: torch.Tensor, post: torch.Tensor, scale_2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """float32 [blocks, elements], amax [blocks] under codes (``pre``) and under values (``post``) -> the stored values,
    the same unscaled, whether each lies within the range of E2M1 (bool), and float32 post / pre scale [blocks]."""
    wanted = blocks.device.type == "cpu" and blocks.dtype == torch.float32
    if not wanted or not (_is_loaded() or _is_worth(blocks)):
        return None
    kernels = load()
    if kernels is None:
        return None
    # Copies: see fake_nvfp4.
    source, before, after = (item.detach().clone().contiguous().numpy() for item in (blocks, pre, post))
    out, values, inside, slopes = (
        torch.empty_like(blocks),
        torch.empty_like(blocks),
        torch.empty(blocks.shape, dtype=torch.bool),
        torch.empty(len(blocks)),
    )
    outputs = (out.numpy(), values.numpy(), inside.numpy(), slopes.numpy())
    kernels.learned_f32(source, before, after, kernels.float32(float(scale_2)), *outputs)
    return out, values, inside, slopes


def _is_loaded() -> bool:
    return load.cache_info().currsize > 0


def block_scales(weight: torch.Tensor, scale_2: torch.Tensor, block: int) -> torch.Tensor | None:
    """[N, K] -> E4M3 scales [N, K/block], amax / 6 of each block."""
    kernels = _kernels_for(weight, scale_2, block)
    if kernels is None:
        return None
    source, kind = _source(weight)
    scales = torch.empty(len(weight), weight.shape[1] // block, dtype=torch.float8_e4m3fn)
    codes = scales.view(torch.uint8).numpy()
    getattr(kernels, f"scales_{kind}")(source, kernels.float32(float(scale_2)), codes)
    return scales


def best_scales(
    weight: torch.Tensor, scale_2: torch.Tensor, candidates: Sequence[torch.Tensor], block: int
) -> torch.Tensor | None:
    """Of E4M3 ``candidates``, each [N, K/block], the one with the least squared error in each block of float32 [N, K].

    Between equals the earlier one. Errors are rounded as torch rounds them on this CPU.
    """
    kernels = _kernels_for(weight, scale_2, block)
    lanes = sum_lanes(block) if kernels is not None and weight.dtype == torch.float32 else None
    if kernels is None or lanes is None:
        return None
    best = candidates[0].clone()
    trials = torch.stack([item.view(torch.uint8) for item in candidates[1:]]).numpy()
    factor = kernels.float32(float(scale_2))
    kernels.search_f32(weight.contiguous().numpy(), factor, trials, lanes, best.view(torch.uint8).numpy())
    return best


@functools.cache
def sum_lanes(size: int) -> int | None:
    """How many partial sums torch keeps when it adds up the last dimension of ``size`` float32 on this CPU, found by
    trying: it is not documented. None when it adds in another order."""
    numbers = torch.rand(1 << 12, size, generator=torch.Generator().manual_seed(0))
    expected = numbers.sum(-1)
    for lanes in (16, 8, 4, 1):
        total = torch.zeros(len(numbers))
        for lane in range(min(lanes, size)):
            own = numbers[:, lane].clone()
            for index in range(lane + lanes, size, lanes):
                own += numbers[:, index]
            total += own
        if torch.equal(total, expected):
            return lanes
    return None


def block_amax(weight: torch.Tensor, block: int) -> torch.Tensor | None:
    """bfloat16 [N, K] -> largest magnitude of each block, float32 [N, K/block]."""
    kernels = _kernels_for(weight, None, block) if weight.dtype == torch.bfloat16 else None
    if kernels is None:
        return None
    found = torch.empty(len(weight), weight.shape[1] // block, dtype=torch.float32)
    kernels.amax_bf16(_words(weight), found.numpy())
    return found


def pack_mxfp4(weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor | None:
    """bfloat16 [N, K] and the power of two of each of its blocks, float32 [N, K/32] -> uint8 [N, K/2] as ``mx.py``."""
    covered = weight.dim() == 2 and weight.dtype == torch.bfloat16
    kernels = _kernels_for(weight, None, weight.shape[1] // factors.shape[1]) if covered else None
    if kernels is None:
        return None
    packed = torch.empty(len(weight), weight.shape[1] // 2, dtype=torch.uint8)
    kernels.mx_codes_bf16(_words(weight), factors.contiguous().numpy(), packed.numpy())
    return packed


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


def _kernels_for(weight: torch.Tensor, scale_2: torch.Tensor | None, block: int) -> ModuleType | None:
    covered = weight.dim() == 2 and weight.dtype in PACKED_DTYPES and _is_worth(weight)
    if not covered or weight.shape[1] % block or block % 2:
        return None
    return load() if scale_2 is None or math.isfinite(float(scale_2)) else None


def _source(weight: torch.Tensor):  # type: ignore[no-untyped-def]  # numpy is imported with torch
    """What the loops read, and the ending of their names."""
    if weight.dtype == torch.bfloat16:
        return _words(weight), "bf16"
    return weight.float().contiguous().numpy(), "f32"


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
