"""Reading values out of JSON documents that other versions of the toolchain, or people, may have written.

A key that is absent, null or of another type is "not measured", never a traceback: every reader says what it expects
and gets that or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Document = Mapping[str, Any]
LARGEST = 1e300
"""Beyond it nothing is a measurement, and sums and squares overflow."""


def number(document: Document, key: str) -> float | None:
    """A finite number, else None. JSON of Python may hold NaN and Infinity: they are no measurement."""
    return as_number(document.get(key))


def as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        return None
    return value


def text(document: Document, key: str) -> str:
    """A string as it is, a number as its digits, everything else as nothing."""
    return as_text(document.get(key))


def as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if as_number(value) is None else str(value)


def texts(value: Any) -> list[str]:
    """The strings and numbers of a list; of anything else none."""
    found = map(as_text, value) if isinstance(value, list) else ()
    return [item for item in found if item]


def part(document: Document, *keys: str) -> Document:
    """The object below ``keys``, or an empty one."""
    for key in keys:
        value = document.get(key)
        if not isinstance(value, Mapping):
            return {}
        document = value
    return document


def parts(document: Document, key: str) -> list[Document]:
    """The objects in a list; others in it are left out."""
    value = document.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def numbers(value: Any) -> list[float]:
    """A list of finite numbers, or an empty one when ``value`` is anything else."""
    if not isinstance(value, list):
        return []
    found = [as_number(item) for item in value]
    return [] if None in found else [item for item in found if item is not None]


def interval(document: Document, key: str) -> tuple[float, float] | None:
    """``intervals.<key>`` as (low, high)."""
    ends = numbers(part(document, "intervals").get(key))
    return (ends[0], ends[1]) if len(ends) == 2 else None


def yes_or_no(value: Any, yes: str, no: str, otherwise: str = "") -> str:
    """Words for true, for false, and for what is neither."""
    return otherwise if not isinstance(value, bool) else yes if value else no


def ratio(one: float | None, other: float | None) -> float | None:
    """``one / other`` where both are known, ``other`` is above 0 and the result is a number that means something."""
    if one is None or other is None or other <= 0:
        return None
    return as_number(one / other)
