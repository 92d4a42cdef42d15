"""NVFP4 times NVFP4 on Blackwell's tensor cores, which apply the scales of both operands themselves.

As ``matmul.py``: weights are the left operand, blocks of experts come from ``routing.py``.
"""

import triton
import triton.language as tl

from toolchain.kernels import epilogue
from toolchain.kernels.routing import block_of


@triton.jit
def _values(codes, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bytes [ROWS, COLUMNS / 2] and E4M3 scales [ROWS, COLUMNS / 16] -> float32, for the interpreter, which takes
    scales for powers of two."""
    both = tl.join(codes & 15, codes >> 4).to(tl.int32)
    code = tl.reshape(both, (ROWS, COLUMNS))
    value = (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    factor = (scale.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    spread = tl.broadcast_to(factor[:, :, None], (ROWS, COLUMNS // 16, 16))
    return value * tl.reshape(spread, (ROWS, COLUMNS))


@triton.jit
def scaled_matmul(
    x,
    x_scale,
    weight,
    scale,
    factor,
    bias,
    routing,
    order,
    block_expert,
    block_begin,
    block_rows,
    out,
    rows,
    N,
    K,
    x_stride,
    x_scale_stride,
    weight_stride,
    expert_stride,
    scale_stride,
    expert_scale_stride,
    out_stride,
    alpha,
    limit,
    ROUTED: tl.constexpr,
    X_DIV: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x uint8 [X, K / 2] with E4M3 scales uint8 [X, K / 16], weight uint8 [E, N, K / 2] with [E, N, K / 16] likewise;
    the rest as ``matmul.packed_matmul``."""
    part = tl.program_id(1)
    expert, block_n, row, valid_m = block_of(
        order, block_expert, block_begin, block_rows, rows, N, ROUTED, BLOCK_M, BLOCK_N, GROUP_M
    )
    if expert < 0:
        return
    x_row = row // X_DIV
    n = tl.minimum(block_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    byte = tl.arange(0, BLOCK_K // 2)
    group = tl.arange(0, BLOCK_K // 16)
    weight_row = weight + expert * expert_stride + n[:, None] * weight_stride + byte[None, :]
    scale_row = scale + expert * expert_scale_stride + n[:, None] * scale_stride + group[None, :]
    x_line = x + x_row[:, None] * x_stride + byte[None, :]
    x_scale_line = x_scale + x_row[:, None] * x_scale_stride + group[None, :]
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    k_begin = part * steps * BLOCK_K
    k_end = tl.minimum(K, k_begin + steps * BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        if EVEN_K:
            w = tl.load(weight_row + k // 2)
            w_scale = tl.load(scale_row + k // 16)
            a = tl.load(x_line + k // 2, mask=valid_m[:, None], other=0)
            a_scale = tl.load(x_scale_line + k // 16, mask=valid_m[:, None], other=0)
        else:
            bytes_there = (k // 2 + byte < K // 2)[None, :]
            groups_there = (k // 16 + group < K // 16)[None, :]
            w = tl.load(weight_row + k // 2, mask=bytes_there, other=0)
            w_scale = tl.load(scale_row + k // 16, mask=groups_there, other=0)
            a = tl.load(x_line + k // 2, mask=valid_m[:, None] & bytes_there, other=0)
            a_scale = tl.load(x_scale_line + k // 16, mask=valid_m[:, None] & groups_there, other=0)
        if WIDE:
            left = _values(w, w_scale, BLOCK_N, BLOCK_K)
            right = _values(a, a_scale, BLOCK_M, BLOCK_K)
            acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
        else:
            acc = tl.dot_scaled(
                w,
                w_scale.to(tl.float8e4nv, bitcast=True),
                "e2m1",
                tl.trans(a),
                a_scale.to(tl.float8e4nv, bitcast=True),
                "e2m1",
                acc,
            )
    acc = acc * tl.load(factor + expert * N + n)[:, None]
    epilogue.store(
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
        BIAS,
        ACTIVATION,
        WEIGHTED,
        SPLIT_K,
        BLOCK_M,
        BLOCK_N,
    )
