"""Attention over pages as a function of torch tensors."""

from __future__ import annotations

import torch
import triton

from toolchain.kernels import attention
from toolchain.kernels.launch import WIDE

PAGE = 64
"""Positions of a page: one block of the kernel."""
MOST_SPLITS = 8
"""Programs that share the positions of one row and head, where it may have so many pages."""


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scaling: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """query [rows, heads, DK] -> [rows, heads, DV], over the ``lengths`` [rows] positions of each row's slot.

    keys [pages, PAGE, KV heads, DK] and values [.., DV]: in the dtype of the query, or uint8 bits of E4M3 under the two
    scales. table int32 [slots, pages of a slot]. ``sinks`` [heads]: gpt-oss's.
    """
    rows, heads, dk = query.shape
    kv_heads, dv = values.shape[2], values.shape[3]
    group = heads // kv_heads
    splits = min(MOST_SPLITS, 1 << (table.shape[1].bit_length() - 1))
    sums = torch.empty((rows, heads, splits, dv), dtype=torch.float32, device=query.device)
    tops = torch.empty((rows, heads, splits), dtype=torch.float32, device=query.device)
    weights = torch.empty_like(tops)
    out = torch.empty((rows, heads, dv), dtype=query.dtype, device=query.device)
    query = query if query.stride(-1) == 1 else query.contiguous()
    attention.attend[(rows, kv_heads, splits)](
        query,
        keys,
        values,
        table,
        slots,
        lengths,
        sums,
        tops,
        weights,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        table.stride(0),
        heads,
        scaling,
        key_scale,
        WINDOW=window,
        GROUP=group,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        DK=dk,
        BLOCK_DK=max(16, triton.next_power_of_2(dk)),
        DV=dv,
        BLOCK_DV=max(16, triton.next_power_of_2(dv)),
        PAGE=PAGE,
        SPLITS=splits,
        FP8=keys.dtype == torch.uint8,
        WIDE=WIDE,
        num_warps=4,
        num_stages=2,
    )
    attention.merge[(rows, heads)](
        sums,
        tops,
        weights,
        sinks,
        out,
        heads,
        value_scale,
        SINKS=sinks is not None,
        DV=dv,
        BLOCK_DV=max(16, triton.next_power_of_2(dv)),
        SPLITS=splits,
        num_warps=2,
    )
    return out
