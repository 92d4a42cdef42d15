"""FP8 with one scale per row and per channel through torch's scaled grouped matmul, where a tuner found it faster.

Rows are gathered in the order of experts before it; ``epilogue.unsort`` scatters them and does what an epilogue does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from toolchain.kernels import epilogue
from toolchain.kernels.packing import Packed

if TYPE_CHECKING:
    from toolchain.kernels.launch import Activation, Rounded
    from toolchain.kernels.sorting import Route


def multiply_by_torch(
    packed: Packed,
    x: Rounded,
    route: Route,
    *,
    out: torch.Tensor,
    x_div: int,
    activation: Activation | None,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """As ``launch.multiply`` with a sorted route. Raises what torch raises where it cannot."""
    from torch.nn.functional import ScalingType, scaled_grouped_mm

    if route.counts is None:
        raise ValueError("pairs that were not sorted cannot be grouped")
    ends = route.counts.cumsum(0, dtype=torch.int32)
    rows = route.order.long() // x_div
    sums = scaled_grouped_mm(
        x.values[rows].view(torch.float8_e4m3fn),
        packed.weight[..., : packed.k].view(torch.float8_e4m3fn).transpose(-2, -1),
        x.scale[rows],
        ScalingType.RowWise,
        packed.factor,
        ScalingType.RowWise,
        offs=ends,
        output_dtype=torch.bfloat16,
        use_fast_accum=False,  # sums in float32, as ours
    )
    width = packed.n // 2 if activation else packed.n
    block = min(triton.next_power_of_2(width), 512)
    name = "none" if activation is None else "clamped" if activation.clamped else "silu"
    epilogue.unsort[(route.pairs, triton.cdiv(width, block))](
        sums,
        route.order,
        ends,
        route.ids,
        packed.bias,
        weights,
        out,
        packed.n,
        packed.experts,
        out.stride(0),
        activation.alpha if activation else 1.0,
        activation.limit if activation else 0.0,
        BIAS=packed.bias is not None,
        ACTIVATION=name,
        WEIGHTED=weights is not None,
        BLOCK=block,
    )
    return out
