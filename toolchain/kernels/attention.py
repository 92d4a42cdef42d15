"""Attention of one new token per row over keys and values in pages, BF16 or FP8 (flash decoding).

Each row's positions are shared out among SPLITS programs; ``merge`` puts their parts together. Lengths and tables of
pages are read from GPU memory, so that one CUDA graph serves a batch however long its rows grow.
"""

import triton
import triton.language as tl

from toolchain.kernels import decode


@triton.jit
def attend(
    query,
    keys,
    values,
    table,
    slots,
    lengths,
    sums,
    tops,
    weights,
    query_row_stride,
    query_head_stride,
    page_stride,
    position_stride,
    head_stride,
    value_page_stride,
    value_position_stride,
    value_head_stride,
    table_stride,
    heads,
    scaling,
    key_scale,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DK: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    FP8: tl.constexpr,
    WIDE: tl.constexpr,
):
    """query [rows, heads, DK]; keys [pages, PAGE, heads / GROUP, DK] and values [.., DV], bfloat16 or bits of E4M3;
    table int32 [slots, ...]: pages of a slot; ``slots``, ``lengths`` int32 [rows], the new position included.

    One program per row, head of keys and split; writes float32 sums [rows, heads, SPLITS, DV] of values, the largest
    score and the sum of weights [rows, heads, SPLITS]. WINDOW > 0: only so many last positions count.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    slot = tl.load(slots + row).to(tl.int64)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    first_page = first // PAGE
    pages = tl.cdiv(length, PAGE) - first_page
    each = tl.cdiv(pages, SPLITS)
    begin = first_page + split * each
    end = tl.minimum(begin + each, first_page + pages)

    g = tl.arange(0, BLOCK_G)
    dk = tl.arange(0, BLOCK_DK)
    dv = tl.arange(0, BLOCK_DV)
    t = tl.arange(0, PAGE)
    q_pointers = (
        query + row * query_row_stride + (head * GROUP + g)[:, None] * query_head_stride + dk[None, :]
    )
    q = tl.load(q_pointers, mask=(g < GROUP)[:, None] & (dk < DK)[None, :], other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_DV), tl.float32)
    for index in range(begin, end):
        page = tl.load(table + slot * table_stride + index).to(tl.int64)
        key_pointers = (
            keys + page * page_stride + t[None, :] * position_stride + head * head_stride + dk[:, None]
        )
        k = tl.load(key_pointers, mask=(dk < DK)[:, None], other=0)
        if FP8:
            k = decode.e4m3(k.to(tl.int32), WIDE)
        if WIDE:
            k = k.to(tl.float32)
        score = tl.dot(q, k, input_precision="ieee") * (scaling * key_scale)
        position = index * PAGE + t
        inside = (position < length) & (position >= first)
        score = tl.where(inside[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(score - shift[:, None])
        factor = tl.exp(top - shift)
        weight = weight * factor + tl.sum(p, axis=1)
        value_pointers = (
            values
            + page * value_page_stride
            + t[:, None] * value_position_stride
            + head * value_head_stride
            + dv[None, :]
        )
        v = tl.load(value_pointers, mask=inside[:, None] & (dv < DV)[None, :], other=0)
        if FP8:
            v = decode.e4m3(v.to(tl.int32), WIDE)
        if WIDE:
            v = v.to(tl.float32)
        acc = acc * factor[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top
    valid = g < GROUP
    place = (row * heads + head * GROUP + g) * SPLITS + split
    tl.store(sums + place[:, None] * DV + dv[None, :], acc, mask=valid[:, None] & (dv < DV)[None, :])
    tl.store(tops + place, top, mask=valid)
    tl.store(weights + place, weight, mask=valid)


@triton.jit
def merge(
    sums,
    tops,
    weights,
    sinks,
    out,
    heads,
    value_scale,
    SINKS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What ``attend`` wrote -> out [rows, heads, DV]. ``sinks`` [heads]: a score of each head without a value."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dv = tl.arange(0, BLOCK_DV)
    place = (row * heads + head) * SPLITS + split
    top = tl.load(tops + place)
    largest = tl.max(top, axis=0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        largest = tl.maximum(largest, sink)
    factor = tl.exp(top - largest)
    total = tl.sum(tl.load(weights + place) * factor, axis=0)
    if SINKS:
        total += tl.exp(sink - largest)
    parts = tl.load(sums + place[:, None] * DV + dv[None, :], mask=(dv < DV)[None, :], other=0.0)
    result = tl.sum(parts * factor[:, None], axis=0) / total * value_scale
    tl.store(out + (row * heads + head) * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)
