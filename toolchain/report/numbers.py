"""Numbers as people read them: sensible digits, units, intervals."""

from __future__ import annotations

from collections.abc import Callable

PERCENT = "\u00a0%"
"""With a space that does not break."""
NOTHING = "–"
"""Shown where there is no figure."""


def significant(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, thousands separated, no trailing exponent between 1e-4 and 1e9."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole:
        return f"{value:,.{max(digits - whole, 0)}f}"
    return f"{float(f'{value:.{digits}g}'):.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    """Decimals that keep ``digits`` significant ones of a value below 1."""
    exponent = int(f"{value:e}".split("e")[1])
    return digits - 1 - exponent


def percent(share: float | None, decimals: int = 2) -> str:
    """0.9316 -> 93.16 %."""
    return NOTHING if share is None else f"{100 * share:.{decimals}f}{PERCENT}"


def signed_percent(share: float | None, decimals: int = 2) -> str:
    """+0.27 %, with a minus sign (U+2212) that is as wide as the plus."""
    return NOTHING if share is None else f"{100 * share:+.{decimals}f}{PERCENT}".replace("-", "\u2212")


def count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in binary units, three or four digits."""
    if value is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:,.0f} B" if unit == "B" else f"{value:,.2f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def seconds(value: float | None) -> str:
    """12.3 s, 4 min 05 s, 2 h 03 min."""
    if value is None:
        return NOTHING
    if value < 100:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"


def between(ends: tuple[float, float] | None, show: Callable[[float], str] = significant) -> str:
    """``95 %: 0.0045 to 0.0050``; nothing without an interval."""
    if ends is None:
        return ""
    low, high = map(show, ends)
    if low.endswith(PERCENT) and high.endswith(PERCENT):
        low = low.removesuffix(PERCENT)
    return f"95{PERCENT}: {low} to {high}"
