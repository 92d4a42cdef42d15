"""Lengths of prompts and answers in tokens: fixed, or drawn from a distribution."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from toolchain.core.errors import UsageError

PARAMETERS = {
    "fixed": ("TOKENS",),
    "normal": ("MEAN", "STD"),
    "uniform": ("LOW", "HIGH"),
    "lognormal": ("MEDIAN", "SIGMA"),
    "exponential": ("MEAN",),
}
"""Kind -> its parameters. SIGMA is the standard deviation of the logarithm."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    kind: str
    """A key of PARAMETERS."""
    values: tuple[float, ...]

    def draw(self, generator: random.Random) -> int:
        """One length, rounded; at least 1: what a distribution gives below that is taken as 1."""
        first, second = self.values[0], self.values[-1]
        if self.kind == "fixed":
            value = first
        elif self.kind == "normal":
            value = generator.gauss(first, second)
        elif self.kind == "uniform":
            value = generator.randint(int(first), int(second))
        elif self.kind == "lognormal":
            value = generator.lognormvariate(math.log(first), second)
        else:
            value = generator.expovariate(1 / first)
        return max(1, round(value))

    @property
    def largest(self) -> int | None:
        """The longest that can come; None without a bound."""
        return int(self.values[-1]) if self.kind in ("fixed", "uniform") else None


def parse_lengths(text: int | str) -> Lengths:
    """``64``, ``normal:256,64``, ``uniform:64,512``, ``lognormal:256,0.5`` or ``exponential:256``.

    UsageError TC-701 for anything else.
    """
    kind, colon, rest = str(text).strip().partition(":")
    if not colon:
        kind, rest = "fixed", kind
    names = PARAMETERS.get(kind)
    expected = ", ".join(
        ("" if name == "fixed" else f"{name}:") + ",".join(parameters)
        for name, parameters in PARAMETERS.items()
    )
    try:
        values = tuple(float(part) for part in rest.split(","))
    except ValueError:
        values = ()
    problem = None
    if names is None or len(values) != len(names) or not all(map(math.isfinite, values)):
        problem = f"expected {expected}"
    elif values[0] < 1:
        problem = f"expected {names[0]} >= 1"
    elif kind in ("fixed", "uniform") and any(value != int(value) for value in values):
        problem = "expected whole numbers"
    elif kind == "uniform" and values[1] < values[0]:
        problem = "expected LOW <= HIGH"
    elif values[-1] < 0:
        problem = f"expected {names[-1]} >= 0"
    if problem:
        raise UsageError(f"{text!r} ({problem})", code="TC-701")
    return Lengths(kind=kind, values=values)
