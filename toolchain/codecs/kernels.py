"""The loops behind ``compiled.py``, which alone imports them: they need numba. One file, because numba's cache notices
changes of the file that a loop stands in, and of no other.

What lets LLVM make vectors of them: a word of 32 bits holds two bfloat16 numbers, the even one low, and becomes one
byte of two codes without a shuffle; the factors of a row stand in an array, as the elements do; indices are unsigned,
so that none is tested for being negative; every intermediate is cast to 32 bits, because numba's own are of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import uint64
from numba.core import types
from numba.extending import intrinsic

float32, uint8, uint16, uint32 = np.float32, np.uint8, np.uint16, np.uint32
E4M3_TINY, E4M3_MAX, E2M1_MAX = float32(2.0**-9), float32(448.0), float32(6.0)
E4M3_SMALLEST_NORMAL = float32(2.0**-6)
"""Below it codes count steps of 2^-9."""
SUBNORMAL_SHIFT = float32(2.0**14)
"""Added, it leaves float32 no finer digit than 2^-9: its own rounding, ties to even, does the work."""
E4M3_BIAS = float32(2.0**120)
"""Exponents of E4M3, put where float32 has its own, are 2^120 too small (biases 7 and 127)."""
ROUNDING_SHIFT = float32(3.0 * 2.0**21)
"""Times a binade: see ``e2m1.round_magnitude``."""
MAGNITUDE = uint32(0x7FFFFFFF)
HIGH_MAGNITUDE = uint32(0x7FFF0000)
HIGH = uint32(0xFFFF0000)
EXPONENT, SIGN = uint32(0x7F800000), uint32(0x80000000)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``njit`` that keeps its code on the disk, where it may. IEEE division; nothing contracted or reassociated."""
    try:
        return numba.njit(function, cache=True, nogil=True, error_model="numpy")
    except RuntimeError:  # no place for the cache: compiled in every process
        return numba.njit(function, nogil=True, error_model="numpy")


inline = numba.njit(inline="always", error_model="numpy")


@intrinsic
def as_float(context: Any, bits: Any) -> Any:
    """uint32 -> the float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
def as_bits(context: Any, value: Any) -> Any:
    """float32 -> its bits as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@inline
def _e4m3(value: Any) -> Any:
    """float32 in [2^-9, 448] -> E4M3 code, to nearest, ties to even."""
    if value < E4M3_SMALLEST_NORMAL:
        return uint8(as_bits(float32(value + SUBNORMAL_SHIFT)) & uint32(0xFF))
    bits = as_bits(value)
    odd = uint32(uint32(bits >> uint32(20)) & uint32(1))
    bits = uint32(uint32(bits + uint32(0x7FFFF)) + odd)
    return uint8(uint32(bits >> uint32(20)) - uint32(120 << 3))


@inline
def _from_e4m3(code: Any) -> Any:
    """Finite E4M3 code -> float32."""
    magnitude = as_float(uint32(uint32(uint32(code) & uint32(0x7F)) << uint32(20)))
    sign = uint32(uint32(uint32(code) & uint32(0x80)) << uint32(24))
    return as_float(uint32(as_bits(float32(magnitude * E4M3_BIAS)) | sign))


@inline
def _e2m1(scaled: Any) -> Any:
    """float32 -> 4 bits in a uint32: to nearest, ties to the even mantissa, saturating, -0 as 0."""
    magnitude = as_float(uint32(as_bits(scaled) & MAGNITUDE))
    code = uint32(magnitude > float32(0.25))
    code = uint32(code + uint32(magnitude >= float32(0.75)))
    code = uint32(code + uint32(magnitude > float32(1.25)))
    code = uint32(code + uint32(magnitude >= float32(1.75)))
    code = uint32(code + uint32(magnitude > float32(2.5)))
    code = uint32(code + uint32(magnitude >= float32(3.5)))
    code = uint32(code + uint32(magnitude > float32(5.0)))
    return uint32(code | uint32(uint32(scaled < float32(0.0)) << uint32(3)))


@inline
def _larger(a: Any, b: Any) -> Any:
    return a if a > b else b


@inline
def _word_magnitude(word: Any) -> Any:
    """Two bfloat16 -> bits of the larger magnitude as float32; those of integers are in the same order."""
    return _larger(uint32(uint32(word << uint32(16)) & MAGNITUDE), uint32(word & HIGH_MAGNITUDE))


@inline
def _block_scale(largest: Any, divisor: Any) -> Any:
    """Bits of a block's largest magnitude -> E4M3 code of its scale, as ``e2m1.block_scales`` has it."""
    scale = float32(as_float(largest) / divisor)
    if scale == float32(0.0):
        scale = float32(1.0)
    return _e4m3(_in_e4m3(scale))


@inline
def _in_e4m3(scale: Any) -> Any:
    return min(max(scale, E4M3_TINY), E4M3_MAX)


@inline
def _round_e2m1(magnitude: Any) -> Any:
    """float32 magnitude -> nearest of E2M1, as ``e2m1.round_magnitude`` has it; saturating at 6, NaN stays."""
    capped = E2M1_MAX if magnitude > E2M1_MAX else magnitude
    binade = as_float(uint32(as_bits(max(capped, float32(1.0))) & EXPONENT))
    shift = float32(binade * ROUNDING_SHIFT)
    return float32(float32(capped + shift) - shift)


@inline
def _rounded_e2m1(scaled: Any) -> Any:
    """float32 -> the nearest E2M1 value, as ``e2m1.round_values`` has it: ties to even, -0 stays."""
    bits = as_bits(scaled)
    magnitude = _round_e2m1(as_float(uint32(bits & MAGNITUDE)))
    return as_float(uint32(as_bits(magnitude) | uint32(bits & SIGN)))


@compiled
def rounded_f32(source: Any, scale_2: Any, group: Any, out: Any) -> None:
    """float32 [N, K] and the scale of the tensor -> the values that NVFP4 in blocks of ``group`` holds for it. A block
    with a NaN is NaN."""
    divisor = float32(E2M1_MAX * scale_2)
    size = uint64(group)
    for row in range(uint64(source.shape[0])):
        for block in range(uint64(uint64(source.shape[1]) // size)):
            start, largest = uint64(block * size), uint32(0)
            for index in range(size):
                magnitude = uint32(as_bits(source[row, uint64(start + index)]) & MAGNITUDE)
                largest = _larger(largest, magnitude)
            if largest > EXPONENT:
                for index in range(size):
                    out[row, uint64(start + index)] = as_float(largest)
                continue
            factor = float32(_from_e4m3(_block_scale(largest, divisor)) * scale_2)
            for index in range(size):
                at = uint64(start + index)
                out[row, at] = float32(_rounded_e2m1(float32(source[row, at] / factor)) * factor)


@compiled
def learned_f32(
    source: Any, pre: Any, post: Any, scale_2: Any, out: Any, values: Any, inside: Any, slopes: Any
) -> None:
    """float32 [blocks, elements] and float32 amax [blocks] of the scales under codes and under values -> what is stored
    for it ``out``, unscaled E2M1 ``values``, whether they lie ``inside`` their range, and post / pre ``slopes``."""
    divisor = float32(E2M1_MAX * scale_2)
    for block in range(uint64(source.shape[0])):
        under = float32(_from_e4m3(_e4m3(_in_e4m3(float32(pre[block] / divisor)))) * scale_2)
        over = float32(_from_e4m3(_e4m3(_in_e4m3(float32(post[block] / divisor)))) * scale_2)
        slopes[block] = float32(over / under)
        for index in range(uint64(source.shape[1])):
            scaled = float32(source[block, index] / under)
            value = _rounded_e2m1(scaled)
            inside[block, index] = as_float(uint32(as_bits(scaled) & MAGNITUDE)) <= E2M1_MAX
            values[block, index] = value
            out[block, index] = float32(value * over)


@compiled
def scales_bf16(source: Any, scale_2: Any, scales: Any) -> None:
    """uint32 [N, K/2] (two bfloat16 each) and the scale of the tensor -> E4M3 codes ``scales`` [N, blocks]."""
    divisor = float32(E2M1_MAX * scale_2)
    words = uint64(source.shape[1] // scales.shape[1])
    for row in range(uint64(source.shape[0])):
        for block in range(uint64(scales.shape[1])):
            largest = uint32(0)
            for index in range(words):
                largest = _larger(largest, _word_magnitude(source[row, uint64(block * words + index)]))
            scales[row, block] = _block_scale(largest, divisor)


@compiled
def scales_f32(source: Any, scale_2: Any, scales: Any) -> None:
    """The same of float32 [N, K]."""
    divisor = float32(E2M1_MAX * scale_2)
    group = uint64(source.shape[1] // scales.shape[1])
    for row in range(uint64(source.shape[0])):
        for block in range(uint64(scales.shape[1])):
            largest = uint32(0)
            for index in range(group):
                bits = as_bits(source[row, uint64(block * group + index)])
                largest = _larger(largest, uint32(bits & MAGNITUDE))
            scales[row, block] = _block_scale(largest, divisor)


@inline
def _spread(scales: Any, row: Any, scale_2: Any, factors: Any) -> None:
    """Codes of a row's scales -> the factor of each byte that will be written."""
    words = uint64(factors.shape[0] // scales.shape[1])
    for block in range(uint64(scales.shape[1])):
        factor = float32(_from_e4m3(scales[row, block]) * scale_2)
        for index in range(words):
            factors[uint64(block * words + index)] = factor


@compiled
def codes_bf16(source: Any, scales: Any, scale_2: Any, packed: Any) -> None:
    """uint32 [N, K/2], E4M3 codes [N, blocks], scale of the tensor -> ``packed`` uint8 [N, K/2]."""
    factors = np.empty(source.shape[1], dtype=np.float32)
    for row in range(uint64(source.shape[0])):
        _spread(scales, row, scale_2, factors)
        for index in range(uint64(source.shape[1])):
            word = source[row, index]
            even = _e2m1(float32(as_float(uint32(word << uint32(16))) / factors[index]))
            odd = _e2m1(float32(as_float(uint32(word & HIGH)) / factors[index]))
            packed[row, index] = uint8(uint32(even | uint32(odd << uint32(4))))


@compiled
def codes_f32(source: Any, scales: Any, scale_2: Any, packed: Any) -> None:
    """The same of float32 [N, K]."""
    factors = np.empty(packed.shape[1], dtype=np.float32)
    for row in range(uint64(source.shape[0])):
        _spread(scales, row, scale_2, factors)
        for index in range(uint64(packed.shape[1])):
            even = _e2m1(float32(source[row, uint64(2 * index)] / factors[index]))
            odd = _e2m1(float32(source[row, uint64(2 * index + 1)] / factors[index]))
            packed[row, index] = uint8(uint32(even | uint32(odd << uint32(4))))


@compiled
def amax_bf16(source: Any, found: Any) -> None:
    """uint32 [N, K/2], two bfloat16 each -> largest magnitude of each block, float32 ``found`` [N, blocks]."""
    words = uint64(source.shape[1] // found.shape[1])
    for row in range(uint64(source.shape[0])):
        for block in range(uint64(found.shape[1])):
            largest = uint32(0)
            for index in range(words):
                largest = _larger(largest, _word_magnitude(source[row, uint64(block * words + index)]))
            found[row, block] = as_float(uint32(largest & HIGH_MAGNITUDE))


@inline
def _e2m1_down(scaled: Any) -> Any:
    """As ``_e2m1``, but ties towards zero, and all that is not above zero with the sign of -0."""
    magnitude = as_float(uint32(as_bits(scaled) & MAGNITUDE))
    code = uint32(magnitude > float32(0.25))
    code = uint32(code + uint32(magnitude > float32(0.75)))
    code = uint32(code + uint32(magnitude > float32(1.25)))
    code = uint32(code + uint32(magnitude > float32(1.75)))
    code = uint32(code + uint32(magnitude > float32(2.5)))
    code = uint32(code + uint32(magnitude > float32(3.5)))
    code = uint32(code + uint32(magnitude > float32(5.0)))
    return uint32(code | uint32(uint32(not (scaled > float32(0.0))) << uint32(3)))


@compiled
def mx_codes_bf16(source: Any, scales: Any, packed: Any) -> None:
    """uint32 [N, K/2] over the float32 ``scales`` [N, blocks] of its blocks -> ``packed`` uint8 [N, K/2]."""
    words = uint64(packed.shape[1] // scales.shape[1])
    factors = np.empty(packed.shape[1], dtype=np.float32)
    for row in range(uint64(source.shape[0])):
        for block in range(uint64(scales.shape[1])):
            for index in range(words):
                factors[uint64(block * words + index)] = scales[row, block]
        for index in range(uint64(packed.shape[1])):
            word = source[row, index]
            even = _e2m1_down(float32(as_float(uint32(word << uint32(16))) / factors[index]))
            odd = _e2m1_down(float32(as_float(uint32(word & HIGH)) / factors[index]))
            packed[row, index] = uint8(uint32(even | uint32(odd << uint32(4))))


@compiled
def largest_bf16(source: Any) -> Any:
    """uint32 [n], two bfloat16 each -> bits of the largest magnitude as float32; a NaN's are larger than all."""
    largest = uint32(0)
    for index in range(uint64(source.shape[0])):
        largest = _larger(largest, _word_magnitude(source[index]))
    return uint32(largest & HIGH_MAGNITUDE)


@compiled
def dequantize(codes: Any, scales: Any, rows: int, columns: int, out: Any) -> None:
    """E4M3 uint8 [N, K] times float32 ``scales`` of blocks of rows x columns -> bits of bfloat16, uint16 [N, K]."""
    width = uint64(codes.shape[1])
    for row in range(uint64(codes.shape[0])):
        line = uint64(row // uint64(rows))
        for block in range(uint64(scales.shape[1])):
            scale = scales[line, block]
            start = uint64(block * uint64(columns))
            for at in range(start, min(width, uint64(start + uint64(columns)))):
                bits = as_bits(float32(_from_e4m3(codes[row, at]) * scale))
                odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
                bits = uint32(uint32(bits + uint32(0x7FFF)) + odd)
                out[row, at] = uint16(bits >> uint32(16))


@compiled
def search_f32(source: Any, scale_2: Any, trials: Any, lanes: int, scales: Any) -> None:
    """Replace the codes ``scales`` [N, blocks] by the one of ``trials`` with the least squared error of its block.

    ``source`` float32 [N, K], ``trials`` uint8 [T, N, blocks], tried in order after ``scales``; a later one has to be
    better. Sums are those of torch on a CPU with vectors of ``lanes`` numbers: partial sums by lane, then lane by lane.
    """
    count = scales.shape[1]
    group = source.shape[1] // count
    turned = np.empty((group, count), dtype=np.float32)
    partial, error, best = (
        np.empty(count, np.float32),
        np.empty(count, np.float32),
        np.empty(count, np.float32),
    )
    factors = np.empty(count, np.float32)
    for row in range(uint64(source.shape[0])):
        for block in range(uint64(count)):
            for index in range(uint64(group)):
                bits = as_bits(source[row, uint64(block * uint64(group) + index)])
                turned[index, block] = as_float(uint32(bits & MAGNITUDE))
        for trial in range(uint64(trials.shape[0] + 1)):
            codes = scales[row] if trial == 0 else trials[uint64(trial - uint64(1)), row]
            for block in range(uint64(count)):
                factors[block] = float32(_from_e4m3(codes[block]) * scale_2)
                error[block] = float32(0.0)
            for lane in range(uint64(lanes)):
                for index in range(lane, uint64(group), uint64(lanes)):
                    for block in range(uint64(count)):
                        scaled = float32(turned[index, block] / factors[block])
                        off = float32(_round_e2m1(scaled) - scaled)
                        own = float32(off * off)
                        partial[block] = own if index == lane else float32(partial[block] + own)
                for block in range(uint64(count)):
                    error[block] = float32(error[block] + partial[block])
            for block in range(uint64(count)):
                found = float32(error[block] * float32(factors[block] * factors[block]))
                if trial == 0:
                    best[block] = found
                elif found < best[block]:
                    best[block] = found
                    scales[row, block] = codes[block]
