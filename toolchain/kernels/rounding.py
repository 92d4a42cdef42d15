"""Inputs as FP8 and NVFP4 tensor cores take them: bit-exact with the codecs' fake quantization.

Rounding is done by adding and subtracting a large number, not by a cast: the same instructions on every GPU, in the
interpreter too, whose casts cut off. 448 / amax is the reciprocal times 448, as torch computes it.
"""

import triton
import triton.language as tl


@triton.jit
def _encode(value, LARGEST: tl.constexpr, LOWEST: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr):
    """float32 -> int32 codes of the nearest number of BITS mantissa bits without the sign, ties to even, saturating at
    LARGEST. Under LOWEST, the smallest normal number, steps are those of LOWEST. BIAS: of float32's exponent over ours.
    """
    magnitude = tl.minimum(tl.abs(value), LARGEST)
    binade = tl.maximum(magnitude, LOWEST).to(tl.int32, bitcast=True) & 0x7F800000
    shift = binade.to(tl.float32, bitcast=True) * (1.5 * (1 << (23 - BITS)))
    rounded = (magnitude + shift) - shift
    normal = (rounded.to(tl.int32, bitcast=True) >> (23 - BITS)) - (BIAS << BITS)
    subnormal = (rounded * ((1 << BITS) / LOWEST)).to(tl.int32)
    return tl.where(rounded < LOWEST, subnormal, normal)


@triton.jit
def to_e4m3(value):
    """float32 -> int32 bits of the nearest E4M3, ties to even, saturating at 448."""
    return _encode(value, 448.0, 0.015625, 3, 120) | tl.where(value < 0, 0x80, 0)


@triton.jit
def e4m3_value(bits):
    """int32 bits of a non-negative E4M3 -> float32."""
    return (bits << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def to_e2m1(value):
    """float32 -> int32 codes of the nearest E2M1, ties to the even mantissa, saturating at 6."""
    return _encode(value, 6.0, 1.0, 1, 126) | tl.where(value < 0, 8, 0)


@triton.jit
def round_e4m3(
    x,
    rows_of,
    given,
    out,
    out_scale,
    K,
    E,
    x_stride,
    X_DIV: tl.constexpr,
    MODE: tl.constexpr,
    ROWS_OF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x rows [*, K] -> E4M3 bits uint8 [R, K] and float32 scales [R] or, for MODE "group", [R, ceil(K / 128)].

    Row r is x[r // X_DIV]. MODE "tensor": under ``given``[``rows_of``[r]] or ``given``[0]; "token": amax / 448 of the
    row; "group": of 128 columns, one program each.
    """
    row = tl.program_id(0).to(tl.int64)
    line = x + row // X_DIV * x_stride
    if MODE == "group":
        column = tl.program_id(1) * 128 + tl.arange(0, 128)
        value = tl.load(line + column, mask=column < K, other=0.0).to(tl.float32)
        amax = tl.max(tl.abs(value), axis=0)
        amax = tl.where(amax > 0, amax, 1.0)
        bits = to_e4m3(value * (tl.div_rn(1.0, amax) * 448.0))
        tl.store(out + row * K + column, bits.to(tl.uint8), mask=column < K)
        tl.store(out_scale + row * tl.num_programs(1) + tl.program_id(1), tl.div_rn(amax, 448.0))
    else:
        if MODE == "token":
            largest = tl.zeros((BLOCK,), tl.float32)
            for begin in range(0, K, BLOCK):
                column = begin + tl.arange(0, BLOCK)
                value = tl.load(line + column, mask=column < K, other=0.0).to(tl.float32)
                largest = tl.maximum(largest, tl.abs(value))
            amax = tl.max(largest, axis=0)
            amax = tl.where(amax > 0, amax, 1.0)
            stored = tl.div_rn(amax, 448.0)
        else:
            index = tl.load(rows_of + row) if ROWS_OF else 0
            # Of no expert: never multiplied.
            stored = tl.load(given + tl.minimum(tl.maximum(index, 0), E - 1))
            amax = stored * 448.0
        factor = tl.div_rn(1.0, amax) * 448.0
        for begin in range(0, K, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            value = tl.load(line + column, mask=column < K, other=0.0).to(tl.float32)
            tl.store(out + row * K + column, to_e4m3(value * factor).to(tl.uint8), mask=column < K)
        tl.store(out_scale + row, stored)


@triton.jit
def round_nvfp4(
    x,
    rows_of,
    given,
    out,
    out_scale,
    K,
    E,
    x_stride,
    X_DIV: tl.constexpr,
    ROWS_OF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x rows [*, K] -> E2M1 codes uint8 [R, K / 2], even elements low, and E4M3 scales uint8 [R, K / 16], under the
    tensor scale ``given``[``rows_of``[r]]. BLOCK columns per program."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.load(rows_of + row) if ROWS_OF else 0
    scale_2 = tl.load(given + tl.minimum(tl.maximum(index, 0), E - 1))
    begin = tl.program_id(1) * BLOCK
    column = begin + tl.arange(0, BLOCK)
    value = tl.load(x + row // X_DIV * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
    blocks = tl.reshape(value, (BLOCK // 16, 16))
    amax = tl.max(tl.abs(blocks), axis=1)
    scale = tl.div_rn(amax, 6.0 * scale_2)
    scale = tl.where(scale == 0, 1.0, scale)
    bits = to_e4m3(tl.maximum(scale, 0.001953125))
    divisor = e4m3_value(bits) * scale_2
    codes = to_e2m1(tl.div_rn(blocks, tl.broadcast_to(divisor[:, None], (BLOCK // 16, 16))))
    low, high = tl.split(tl.reshape(codes, (BLOCK // 2, 2)))
    half = begin // 2 + tl.arange(0, BLOCK // 2)
    tl.store(out + row * (K // 2) + half, (low | (high << 4)).to(tl.uint8), mask=half < K // 2)
    group = begin // 16 + tl.arange(0, BLOCK // 16)
    tl.store(out_scale + row * (K // 16) + group, bits.to(tl.uint8), mask=group < K // 16)
