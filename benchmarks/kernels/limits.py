"""What the card can do at most, measured in the same run: bytes copied and operations multiplied per second."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.kernels.layers import MoeLayer
from toolchain.kernels.packing import Packed
from toolchain.modeling.packed.tuning import seconds_of

SIDE = 8192


def measure_limits(device: torch.device) -> dict[str, float]:
    """``bytes_per_s`` (read and written, of a copy of 4 GiB), ``bf16_per_s`` and ``fp8_per_s`` (operations)."""
    if device.type != "cuda":
        return {"bytes_per_s": 1e10, "bf16_per_s": 1e11, "fp8_per_s": 1e11}
    source = torch.empty(2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds_of(partial(target.copy_, source), device)
    a = torch.randn((SIDE, SIDE), dtype=torch.bfloat16, device=device)
    b = torch.randn((SIDE, SIDE), dtype=torch.bfloat16, device=device)
    operations = 2 * SIDE**3
    bf16 = operations / seconds_of(partial(torch.mm, a, b), device)
    return {"bytes_per_s": copied, "bf16_per_s": bf16, "fp8_per_s": _fp8(a, b, operations, device) or bf16}


def _fp8(a: torch.Tensor, b: torch.Tensor, operations: int, device: torch.device) -> float:
    if torch.cuda.get_device_capability(device) < (8, 9):
        return 0.0
    one = torch.ones((), device=device)
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
    call = partial(torch._scaled_mm, left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return operations / seconds_of(call, device)


def limit_s(
    layer: MoeLayer, gate_up: Packed, down: Packed, ids: torch.Tensor, limits: dict[str, float]
) -> tuple[float, str]:
    """The shortest time that the layer can take, and whether ``memory`` or ``compute`` sets it."""
    reached = int(ids.unique().numel())
    weights = (gate_up.nbytes + down.nbytes) / layer.experts * reached
    tokens, pairs = ids.shape[0], ids.numel()
    # Inputs and outputs once each in BF16, and what lies between the two multiplications.
    moved = weights + 2 * (2 * tokens * layer.hidden + 2 * pairs * layer.inner)
    operations = 2 * pairs * 3 * layer.hidden * layer.inner
    rate = limits["fp8_per_s" if gate_up.kind.rounding in ("tensor", "token", "group") else "bf16_per_s"]
    memory, compute = moved / limits["bytes_per_s"], operations / rate
    return max(memory, compute), "memory" if memory >= compute else "compute"
