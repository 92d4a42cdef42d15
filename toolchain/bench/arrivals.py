"""When the requests of an open loop are due."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from toolchain.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """Gaps between requests follow a gamma distribution: ``cv`` 1 is a Poisson process, 0 is even spacing."""

    cv: float
    """Standard deviation of the gaps over their mean."""

    def times(self, rate: float, generator: random.Random) -> Iterator[float]:
        """Seconds from the start at which requests are due, ``rate`` per second on average, without end."""
        due = 0.0
        shape = 1 / self.cv**2 if self.cv else math.inf
        while True:
            if self.cv == 1.0:
                due += generator.expovariate(rate)
            elif self.cv:
                due += generator.gammavariate(shape, 1 / (rate * shape))
            else:
                due += 1 / rate
            yield due


def parse_arrival(text: str) -> Arrival:
    """``poisson``, ``constant`` or ``gamma:CV``. UsageError TC-701 for anything else."""
    if text == "poisson":
        return Arrival(cv=1.0)
    if text == "constant":
        return Arrival(cv=0.0)
    kind, _, rest = text.partition(":")
    try:
        cv = float(rest)
    except ValueError:
        cv = math.nan
    if kind != "gamma" or not 0 < cv <= 10:
        raise UsageError(
            f"{text!r} (expected poisson, constant or gamma:CV with 0 < CV <= 10)", code="TC-701"
        )
    return Arrival(cv=cv)
