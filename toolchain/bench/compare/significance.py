"""Whether one figure differs between two results, by scipy's tests, as a ratio with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from toolchain.bench.types import Distribution

CONFIDENCE = 0.95
FEW_REQUESTS = 10
"""Fewer requests than this are too few for the mean of a skewed distribution to be normal."""
REPEATS, REQUESTS, NOTHING = "repeats", "requests", "nothing"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """``ratio`` is B over A."""

    a: float
    b: float
    ratio: float | None
    """None where a figure is 0: nothing to divide by."""
    low: float | None
    high: float | None
    """Ends of its 95 % confidence interval; None where the data cannot say."""
    p: float | None
    """Of the null hypothesis that both are equal, two-sided."""
    basis: str
    """``repeats``: the spread between repeats. ``requests``: only that between the requests of one run each, so what
    differs from run to run is not in it. ``nothing``: one run, and no spread is known."""
    repeats: tuple[int, int]


def from_repeats(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Welch's test on the logarithms of the figures of the repeats: relative noise, unequal variances.

    Means are geometric ones. With one value on a side, or a value that is not above 0, there is a ratio at most.
    """
    repeats = (len(a), len(b))
    if min(*a, *b) <= 0:
        return _no_test(math.fsum(a) / len(a), math.fsum(b) / len(b), repeats)
    logs_a, logs_b = [math.log(value) for value in a], [math.log(value) for value in b]
    mean_a, mean_b = (math.exp(math.fsum(logs) / len(logs)) for logs in (logs_a, logs_b))
    if min(repeats) < 2:
        return _no_test(mean_a, mean_b, repeats)
    if len({*logs_a}) == 1 and len({*logs_b}) == 1:  # no spread at all: nothing that a test could weigh
        ratio = mean_b / mean_a
        p = 1.0 if ratio == 1 else 0.0
        return Estimate(
            a=mean_a, b=mean_b, ratio=ratio, low=ratio, high=ratio, p=p, basis=REPEATS, repeats=repeats
        )
    from scipy import stats

    test = stats.ttest_ind(logs_b, logs_a, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return Estimate(
        a=mean_a,
        b=mean_b,
        ratio=mean_b / mean_a,
        low=_exp(float(interval.low)),
        high=_exp(float(interval.high)),
        p=float(test.pvalue),
        basis=REPEATS,
        repeats=repeats,
    )


def from_requests(a: Distribution, b: Distribution) -> Estimate:
    """Of the means over the requests of one run each: Welch's test, and the interval of the ratio of two means by the
    delta method on its logarithm, with the same degrees of freedom."""
    known = a.std is not None and b.std is not None and min(a.count, b.count) >= FEW_REQUESTS
    if not known or min(a.mean, b.mean) <= 0:
        return _no_test(a.mean, b.mean, (1, 1))
    from scipy import stats

    test = stats.ttest_ind_from_stats(b.mean, b.std, b.count, a.mean, a.std, a.count, equal_var=False)
    parts = [(each.std or 0.0) ** 2 / each.count / each.mean**2 for each in (a, b)]
    error = math.sqrt(sum(parts))
    ratio = b.mean / a.mean
    low = high = ratio
    p = float(test.pvalue)
    if error:
        freedom = sum(parts) ** 2 / sum(
            part**2 / (each.count - 1) for part, each in zip(parts, (a, b), strict=True)
        )
        half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
        low, high = ratio * _exp(-half), ratio * _exp(half)
    else:
        p = 1.0 if ratio == 1 else 0.0
    return Estimate(a=a.mean, b=b.mean, ratio=ratio, low=low, high=high, p=p, basis=REQUESTS, repeats=(1, 1))


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjustment (1995) for so many comparisons at once: their false discovery rate."""
    if not p_values:
        return []
    from scipy import stats

    return [float(p) for p in stats.false_discovery_control(p_values, method="bh")]


def _no_test(a: float, b: float, repeats: tuple[int, int]) -> Estimate:
    ratio = b / a if a > 0 else None
    return Estimate(a=a, b=b, ratio=ratio, low=None, high=None, p=None, basis=NOTHING, repeats=repeats)


def _exp(value: float) -> float:
    """Of a log ratio; two repeats that hardly agree have intervals without a useful end."""
    return math.exp(min(value, 700.0))
