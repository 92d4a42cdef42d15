"""What happens to a block of sums before it is written: bias, activation between gate and up, routing weights."""

import triton
import triton.language as tl


@triton.jit
def activate(gate, up, CLAMPED: tl.constexpr, alpha, limit):
    """SiLU(gate) * up; or gpt-oss's, clamped: (up + 1) * gate * sigmoid(alpha * gate)."""
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return (up + 1.0) * (gate * (1.0 / (1.0 + tl.exp(-alpha * gate))))
    return gate * (1.0 / (1.0 + tl.exp(-gate))) * up


@triton.jit
def store(
    acc,
    out,
    bias,
    routing,
    row,
    valid_m,
    block_n,
    expert,
    rows,
    N,
    out_stride,
    alpha,
    limit,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """acc float32 [BLOCK_N, BLOCK_M] -> rows ``row`` [BLOCK_M] of out; with SPLIT_K > 1 as they are, for ``finish``."""
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_n = n < N
    result = tl.trans(acc)
    if SPLIT_K > 1:
        pointers = out + (tl.program_id(1) * rows + row)[:, None] * N + n[None, :]
        tl.store(pointers, result, mask=valid_m[:, None] & valid_n[None, :])
    else:
        if BIAS:
            result += tl.load(bias + expert * N + n, mask=valid_n, other=0.0)[None, :]
        if ACTIVATION != "none":
            gate, up = tl.split(tl.reshape(result, (BLOCK_M, BLOCK_N // 2, 2)))
            result = activate(gate, up, ACTIVATION == "clamped", alpha, limit)
            n_out = block_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            valid_out = n_out < N // 2
        else:
            n_out = n
            valid_out = valid_n
        if WEIGHTED:
            result = result * tl.load(routing + row, mask=valid_m, other=0.0).to(tl.float32)[:, None]
        pointers = out + row[:, None] * out_stride + n_out[None, :]
        tl.store(pointers, result.to(out.dtype.element_ty), mask=valid_m[:, None] & valid_out[None, :])


@triton.jit
def finish(
    partial,
    bias,
    routing,
    experts,
    out,
    rows,
    N,
    out_stride,
    alpha,
    limit,
    E,
    ROUTED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """float32 [SPLIT_K, rows, N] -> out [rows, N or N / 2]: the sum, then what ``packed_matmul`` does with one.

    ``experts`` [rows]: whose bias a row takes. Rows of no expert were not computed and are left as they are.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + row).to(tl.int64) if ROUTED else tl.zeros((), tl.int64)
    if (expert < 0) | (expert >= E):
        return
    GATED: tl.constexpr = ACTIVATION != "none"
    width = N // 2 if GATED else N
    valid = column < width
    first = column * 2 if GATED else column
    sums = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT_K):
        line = partial + (part * rows + row) * N
        sums += tl.load(line + first, mask=valid, other=0.0)
        if GATED:
            second += tl.load(line + first + 1, mask=valid, other=0.0)
    if BIAS:
        sums += tl.load(bias + expert * N + first, mask=valid, other=0.0)
        if GATED:
            second += tl.load(bias + expert * N + first + 1, mask=valid, other=0.0)
    if GATED:
        sums = activate(sums, second, ACTIVATION == "clamped", alpha, limit)
    if WEIGHTED:
        sums = sums * tl.load(routing + row).to(tl.float32)
    tl.store(out + row * out_stride + column, sums.to(out.dtype.element_ty), mask=valid)


@triton.jit
def unsort(
    sums,
    order,
    ends,
    ids,
    bias,
    routing,
    out,
    N,
    E,
    out_stride,
    alpha,
    limit,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scaled sums [pairs, N] in the order of experts -> out [pairs, N or N / 2] in their own; ``ends`` [E]: where each
    expert's rows end. Rows behind the last one belong to no expert."""
    position = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if position >= tl.load(ends + E - 1):
        return
    pair = tl.load(order + position).to(tl.int64)
    GATED: tl.constexpr = ACTIVATION != "none"
    width = N // 2 if GATED else N
    valid = column < width
    first = column * 2 if GATED else column
    value = tl.load(sums + position * N + first, mask=valid, other=0.0).to(tl.float32)
    expert = tl.load(ids + pair).to(tl.int64)
    if BIAS:
        value += tl.load(bias + expert * N + first, mask=valid, other=0.0)
    if GATED:
        up = tl.load(sums + position * N + first + 1, mask=valid, other=0.0).to(tl.float32)
        if BIAS:
            up += tl.load(bias + expert * N + first + 1, mask=valid, other=0.0)
        value = activate(value, up, ACTIVATION == "clamped", alpha, limit)
    if WEIGHTED:
        value = value * tl.load(routing + pair).to(tl.float32)
    tl.store(out + pair * out_stride + column, value.to(out.dtype.element_ty), mask=valid)
