"""What the bytes of a tensor may be: NaN, infinities, zeros and signs told from the codes. numpy, no torch.

Nothing is converted to floating point. A scale is good when its code, read as an unsigned integer, lies between two
bounds. A floating code is NaN or infinite when all bits of its exponent are set: after masking everything else away,
adding the lowest of them carries into the sign's place, eight bytes at a time and never across elements. The ufuncs
give up the interpreter lock, so that several threads check at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One dtype of a safetensors file. IEEE 754, OCP FP8 (E4M3 has no infinity) and OCP E8M0."""

    width: int
    """Bytes per element."""
    exponent: int = 0
    """Bits that are all set in NaN (and infinity); 0 when every code is a number."""
    sign: int = 0
    largest: int = 0
    """Code of the largest finite positive number; 0 for dtypes that are no scale."""
    smallest: int = 1
    """Code of the smallest positive number."""


KINDS: dict[str, Kind] = {
    "F32": Kind(width=4, exponent=0x7F80_0000, sign=0x8000_0000, largest=0x7F7F_FFFF),
    "BF16": Kind(width=2, exponent=0x7F80, sign=0x8000, largest=0x7F7F),
    "F16": Kind(width=2, exponent=0x7C00, sign=0x8000, largest=0x7BFF),
    "F8_E4M3": Kind(width=1, exponent=0x7F, sign=0x80, largest=0x7E),
    "U8": Kind(width=1, largest=254, smallest=0),
    "F8_E8M0": Kind(width=1, largest=254, smallest=0),
}
"""U8 as a scale is E8M0: every code is a positive power of two but 255, which is NaN."""
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
ZEROS = {"U8": 0x7777_7777_7777_7777}
"""Bits that make a code other than zero; all of them where this table is silent. E2M1 has -0, ModelOpt's MXFP4 uses
it. In packed INT4 the code 8 is -8 and not zero: there a tensor of nothing but 0 and -8 would be called zero, which no
exporter writes, because -8 is not the mirror of anything."""


class Scratch:
    """Working memory of one thread, reused for every chunk."""

    def __init__(self, size: int) -> None:
        self._words = np.empty(size // 8, dtype=np.uint64)

    def has_non_finite(self, data: Bytes, kind: Kind) -> bool:
        """True when some floating code is NaN or infinite."""
        if not kind.exponent:
            return False
        ones = _ones(kind.width)
        mask, lowest = kind.exponent * ones, (kind.exponent & -kind.exponent) * ones
        words, tail = _as_words(data)
        for part in (words, tail):
            if part.size:
                room = self._words[: part.size]
                np.bitwise_and(part, np.uint64(mask), out=room)
                np.add(room, np.uint64(lowest), out=room)
                if int(np.bitwise_or.reduce(room)) & (kind.sign * ones):
                    return True
        return False


def _ones(width: int) -> int:
    """1 in every element of ``width`` bytes of a 64-bit word."""
    return sum(1 << (8 * width * index) for index in range(8 // width))


def _as_words(data: Bytes) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Whole words, and the last bytes in a word of their own, filled with zeros."""
    whole = data.size // 8 * 8
    tail = np.zeros(8 if data.size > whole else 0, dtype=np.uint8)
    tail[: data.size - whole] = data[whole:]
    return data[:whole].view(np.uint64), tail.view(np.uint64)


def is_zero(data: Bytes, dtype: str) -> bool:
    """True when every element is zero."""
    words, tail = _as_words(data)
    bits = int(np.bitwise_or.reduce(words)) if words.size else 0
    bits |= int(tail[0]) if tail.size else 0
    return not bits & ZEROS.get(dtype, (1 << 64) - 1)


def bad_scales(data: Bytes, kind: Kind) -> tuple[int, int]:
    """(not finite, zero or negative) elements of a tensor of scales."""
    codes = data.view(_UNSIGNED[kind.width])
    if not codes.size or (int(codes.min()) >= kind.smallest and int(codes.max()) <= kind.largest):
        return 0, 0
    magnitude = codes & codes.dtype.type(~kind.sign & (1 << (8 * kind.width)) - 1)
    not_finite = magnitude > kind.largest
    low = ((codes < kind.smallest) | (codes > kind.largest)) & ~not_finite
    return int(not_finite.sum()), int(low.sum())


def non_finite(data: Bytes, kind: Kind) -> int:
    """How many floating codes are NaN or infinite: for the message, once ``has_non_finite`` said that some are."""
    codes = data.view(_UNSIGNED[kind.width])
    mask = codes.dtype.type(kind.exponent)
    return int(((codes & mask) == mask).sum())
