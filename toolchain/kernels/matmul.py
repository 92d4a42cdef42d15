"""The dequantizing matrix product, for the experts of a layer and for single Linears.

out[row] = activation(factor * sum_k decode(weight[expert(row)])[:, k] * x[row, k] + bias) * routing weight

Weights are the left operand: on Hopper decoded weights go from registers straight into wgmma, whose other operand, the
inputs, may be as few as 8 rows in the instruction: a batch of one wastes the least. The accumulator is therefore
[BLOCK_N, BLOCK_M], and is turned round in the end (``epilogue.py``).
"""

import triton
import triton.language as tl

from toolchain.kernels import decode, epilogue
from toolchain.kernels.routing import block_of


@triton.jit
def _spread(scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS / 16] -> [ROWS, COLUMNS], each 16 times."""
    wide = tl.broadcast_to(scale[:, :, None], (ROWS, COLUMNS // 16, 16))
    return tl.reshape(wide, (ROWS, COLUMNS))


@triton.jit
def packed_matmul(
    x,
    x_scale,
    weight,
    scale,
    factor,
    bias,
    channel,
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
    CODE: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    ROUNDED: tl.constexpr,
    ROUTED: tl.constexpr,
    X_DIV: tl.constexpr,
    X_SCALE_GROUPS: tl.constexpr,
    CHANNEL: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
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
    """x [X, K] (bfloat16, or E4M3 with ``x_scale``), rows of it by ``order`` // X_DIV; out [rows, N or N / 2].

    ``scale`` of NVFP4 is int16: the two scales of a unit of 32 at once. CODE: "e2m1", "int4", "e4m3", or "e4m3x" where
    E4M3 is multiplied as it is. SCALES: of Kind. ROUNDED: ``x_scale`` is there: per row of x, or per row and 128
    columns (X_SCALE_GROUPS). With SPLIT_K > 1 each of SPLIT_K programs adds up its part of K and writes float32
    [SPLIT_K, rows, N], which ``finish`` goes on with.
    """
    part = tl.program_id(1)
    expert, block_n, row, valid_m = block_of(
        order, block_expert, block_begin, block_rows, rows, N, ROUTED, BLOCK_M, BLOCK_N, GROUP_M
    )
    if expert < 0:
        return
    x_row = row // X_DIV

    # Rows beyond the last one read the last one again, which is thrown away.
    n_safe = tl.minimum(block_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)

    FOUR: tl.constexpr = CODE == "e2m1" or CODE == "int4"
    STEP: tl.constexpr = BLOCK_K // 2 if FOUR else BLOCK_K
    columns = tl.arange(0, STEP)
    if FOUR:
        # Of the elements in low nibbles; those in high ones follow 16 further on.
        k_low = columns // 16 * 32 + columns % 16
    else:
        k_low = columns
    weight_row = weight + expert * expert_stride + n_safe[:, None] * weight_stride
    if SCALES == "block":
        if GATED:
            scale_n = n_safe // 2 // 128 * 2 + n_safe % 2
        else:
            scale_n = n_safe // 128
    else:
        scale_n = n_safe
    if SCALES != "none":
        scale_row = scale + expert * expert_scale_stride + scale_n * scale_stride

    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    k_begin = part * steps * BLOCK_K
    k_end = tl.minimum(K, k_begin + steps * BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        x_pointers = x + x_row[None, :] * x_stride + (k + k_low)[:, None]
        if EVEN_K:
            x_low = tl.load(x_pointers, mask=valid_m[None, :], other=0)
        else:
            x_low = tl.load(x_pointers, mask=valid_m[None, :] & ((k + k_low) < K)[:, None], other=0)
        if CHANNEL:
            channel_low = tl.load(channel + expert * K + k + k_low, mask=(k + k_low) < K, other=0.0)
            if WIDE:
                x_low = x_low.to(tl.float32) * channel_low.to(tl.float32)[:, None]
            else:
                x_low = x_low * channel_low[:, None]
        if FOUR:
            if EVEN_K:
                x_high = tl.load(x_pointers + 16, mask=valid_m[None, :], other=0)
                codes = tl.load(weight_row + (k // 2 + columns)[None, :])
            else:
                x_high = tl.load(
                    x_pointers + 16, mask=valid_m[None, :] & ((k + k_low + 16) < K)[:, None], other=0
                )
                codes = tl.load(
                    weight_row + (k // 2 + columns)[None, :], mask=((k + k_low) < K)[None, :], other=0
                )
            if CHANNEL:
                channel_high = tl.load(
                    channel + expert * K + k + k_low + 16, mask=(k + k_low + 16) < K, other=0.0
                )
                if WIDE:
                    x_high = x_high.to(tl.float32) * channel_high.to(tl.float32)[:, None]
                else:
                    x_high = x_high * channel_high[:, None]
            codes = codes.to(tl.int32)
            low, high = codes & 15, codes >> 4
            if CODE == "e2m1":
                unit = k // 32 + tl.arange(0, STEP // 16)
                if EVEN_K:
                    pair = tl.load(scale_row[:, None] + unit[None, :])
                else:
                    pair = tl.load(scale_row[:, None] + unit[None, :], mask=(unit * 32 < K)[None, :], other=0)
                pair = pair.to(tl.int32)
                scale_low = _spread(decode.group_scale(pair & 0xFF, SCALES == "e8m0", WIDE), BLOCK_N, STEP)
                if GROUP == 16:
                    high_scale = decode.group_scale((pair >> 8) & 0xFF, False, WIDE)
                    scale_high = _spread(high_scale, BLOCK_N, STEP)
                else:
                    scale_high = scale_low
                w_low = decode.e2m1(low, scale_low, WIDE)
                w_high = decode.e2m1(high, scale_high, WIDE)
            else:
                w_low = decode.int4(low, WIDE)
                w_high = decode.int4(high, WIDE)
            if WIDE:
                x_low, x_high = x_low.to(tl.float32), x_high.to(tl.float32)
            if SCALES == "float32":
                sums = tl.dot(w_low, x_low, input_precision="ieee")
                sums = tl.dot(w_high, x_high, sums, input_precision="ieee")
                acc += sums * tl.load(scale_row + k // 128)[:, None]
            else:
                acc = tl.dot(w_low, x_low, acc, input_precision="ieee")
                acc = tl.dot(w_high, x_high, acc, input_precision="ieee")
        else:
            if EVEN_K:
                codes = tl.load(weight_row + (k + columns)[None, :])
            else:
                codes = tl.load(
                    weight_row + (k + columns)[None, :], mask=((k + columns) < K)[None, :], other=0
                )
            if CODE == "e4m3":
                w = decode.e4m3(codes.to(tl.int32), WIDE)
                if ROUNDED:
                    x_low = decode.e4m3(x_low.to(tl.int32), WIDE)
                elif WIDE:
                    x_low = x_low.to(tl.float32)
            else:
                w = codes.to(tl.float8e4nv, bitcast=True)
                x_low = x_low.to(tl.float8e4nv, bitcast=True)
            if SCALES == "block" or X_SCALE_GROUPS:
                # A block of 128 at a time: the sums under one scale stay short enough for FP8 tensor cores, too.
                sums = tl.dot(w, x_low, input_precision="ieee")
                if SCALES == "block":
                    sums = sums * tl.load(scale_row + k // 128)[:, None]
                if X_SCALE_GROUPS:
                    x_factor = tl.load(x_scale + x_row * x_scale_stride + k // 128, mask=valid_m, other=0.0)
                    sums = sums * x_factor[None, :]
                acc += sums
            elif CODE == "e4m3x":
                # FP8 tensor cores of Hopper keep about 14 bits of a sum: short sums, added up in float32.
                acc += tl.dot(w, x_low)
            else:
                acc = tl.dot(w, x_low, acc, input_precision="ieee")

    acc = acc * tl.load(factor + expert * N + n_safe)[:, None]
    if ROUNDED and not X_SCALE_GROUPS:
        acc = acc * tl.load(x_scale + x_row * x_scale_stride, mask=valid_m, other=0.0)[None, :]
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
