"""Attention over pages in Triton's interpreter, against torch's own over each row's positions."""

from __future__ import annotations

import pytest
import torch

from toolchain.codecs import fp8
from toolchain.kernels.decoding import PAGE, attend


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    """float64, one row: query [heads, DK], keys [T, KV, DK], values [T, KV, DV]."""
    group = query.shape[0] // keys.shape[1]
    keys, values = (item.repeat_interleave(group, 1).double() for item in (keys, values))
    scores = torch.einsum("hd,thd->ht", query.double(), keys) * scaling
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None]), dim=1)
    weights = scores.softmax(-1)[:, : len(keys)]
    return torch.einsum("ht,thd->hd", weights, values)


@pytest.mark.parametrize(("heads", "kv_heads", "dk", "dv"), [(4, 2, 32, 32), (8, 1, 64, 64), (4, 4, 48, 32)])
@pytest.mark.parametrize("stored", ["same", "fp8"])
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_each_row_attends_to_its_own_positions(
    heads: int, kv_heads: int, dk: int, dv: int, stored: str, window: int, with_sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(heads * dk)
    lengths = [1, 63, 64, 65, 200, 600]
    slots = [3, 0, 5, 1, 4, 2]
    width = -(-max(lengths) // PAGE)
    pages = torch.randperm(6 * width, generator=generator).reshape(6, width).to(torch.int32)
    keys = torch.randn(6 * width, PAGE, kv_heads, dk, generator=generator)
    values = torch.randn(6 * width, PAGE, kv_heads, dv, generator=generator)
    query = torch.randn(len(lengths), heads, dk, generator=generator)
    sinks = torch.randn(heads, generator=generator) if with_sinks else None
    key_scale, value_scale = (0.011, 0.017) if stored == "fp8" else (1.0, 1.0)
    seen_keys, seen_values = keys, values
    if stored == "fp8":
        keys, values = (
            fp8.encode(item, scale * 448).view(torch.uint8)
            for item, scale in ((keys, key_scale), (values, value_scale))
        )
        seen_keys = keys.view(torch.float8_e4m3fn).float() * key_scale
        seen_values = values.view(torch.float8_e4m3fn).float() * value_scale
    out = attend(
        query, keys, values, pages, torch.tensor(slots, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32),
        scaling=0.2, window=window, sinks=sinks, key_scale=key_scale, value_scale=value_scale,
    )  # fmt: skip
    for row, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        own = slice(max(0, length - window) if window else 0, length)
        own_keys = seen_keys[pages[slot].long()].flatten(0, 1)[own]
        own_values = seen_values[pages[slot].long()].flatten(0, 1)[own]
        expected = reference(query[row], own_keys, own_values, 0.2, sinks)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-5)
