"""Codes -> numbers in registers, by moving bits: exact, and the same instructions on every GPU since sm_80.

Functions of the Triton language; tiles are [rows, columns]. ``WIDE`` makes float32 of what would be bfloat16: Triton's
interpreter computes on bfloat16 as on integers.
"""

import triton
import triton.language as tl


@triton.jit
def e2m1(codes, scale, WIDE: tl.constexpr):
    """int32 codes 0..15 and their scales (2**100 too large) -> code * scale, 2**-26 too small.

    Sign and magnitude are put where a float has its sign, lowest exponent and highest mantissa bits: that reads as
    the magnitude times 2**-126, subnormal ones included. A product has 6 significant bits, bfloat16 has 8.
    """
    if WIDE:
        bits = ((codes & 8) << 28) | ((codes & 7) << 22)
        return bits.to(tl.float32, bitcast=True) * scale
    bits = ((codes & 8) << 12) | ((codes & 7) << 6)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True) * scale


@triton.jit
def int4(codes, WIDE: tl.constexpr):
    """int32 codes 0..15 in two's complement -> -8..7.

    As the last mantissa bits of 128 in bfloat16, whose steps are 1 there."""
    if WIDE:
        return ((codes ^ 8) - 8).to(tl.float32)
    bits = (codes ^ 8) | 0x4300
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True) - 136.0


@triton.jit
def e4m3(codes, WIDE: tl.constexpr):
    """int32 bits of E4M3 -> the number; NaN codes read as 480. Exponent and mantissa become those of a float that is
    2**120 too small."""
    if WIDE:
        bits = ((codes & 0x80) << 24) | ((codes & 0x7F) << 20)
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    bits = ((codes & 0x80) << 8) | ((codes & 0x7F) << 4)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True) * 1.329227995784916e36


@triton.jit
def group_scale(codes, E8M0: tl.constexpr, WIDE: tl.constexpr):
    """int32 bits of a group's scale -> that scale times 2**100. E8M0 was biased by 100 when it was packed."""
    if E8M0:
        scale = (codes << 23).to(tl.float32, bitcast=True)
    else:
        bits = codes << 20
        scale = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36 * 1.2676506002282294e30
    if WIDE:
        return scale
    return scale.to(tl.bfloat16)
