"""Confidence intervals of means of a few repeats: Student's t, which allows for how few they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.bench.types import Interval, Summary

CONFIDENCE = 0.95
DISTRIBUTIONS = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms", "user_tokens_per_s")
QUANTILES = ("p50", "p90", "p95", "p99", "mean")
RATES = ("output_tokens_per_s", "requests_per_s", "output_tokens_per_s_per_gpu")


def t_interval(values: Sequence[float]) -> Interval | None:
    """Of the mean of ``values``; None of fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile(0.5 + CONFIDENCE / 2, count - 1) * deviation / math.sqrt(count)
    return Interval(mean=mean, low=mean - half, high=mean + half, repeats=count, confidence=CONFIDENCE)


def intervals(repeats: Sequence[Summary]) -> dict[str, Interval]:
    """Figure -> interval, of every figure that all ``repeats`` have."""
    figures = [figures_of(repeat) for repeat in repeats]
    names = [name for name in (figures[0] if figures else {}) if all(name in found for found in figures)]
    found = {name: t_interval([each[name] for each in figures]) for name in names}
    return {name: interval for name, interval in found.items() if interval is not None}


def figures_of(summary: Summary) -> Mapping[str, float]:
    """``ttft_ms.p50`` and the like -> value, of those that there are."""
    found: dict[str, float] = {}
    for name in DISTRIBUTIONS:
        values: Any = getattr(summary, name)
        for quantile in QUANTILES:
            if values is not None and (value := getattr(values, quantile)) is not None:
                found[f"{name}.{quantile}"] = value
    for name in RATES:
        if (rate := getattr(summary, name)) is not None:
            found[name] = rate
    if summary.goodput is not None:
        found["goodput.share"] = summary.goodput.share
        found["goodput.requests_per_s"] = summary.goodput.requests_per_s
    return found


def t_quantile(probability: float, degrees: int) -> float:
    """Of Student's t with whole ``degrees`` of freedom, for a ``probability`` from 0.5 to below 1."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_probability(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0: the finite sums of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3-4."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    term, total = 1.0, 0.0
    if degrees % 2:
        term = cosine
        for index in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= cosine**2 * 2 * index / (2 * index + 1)
        both = 2 / math.pi * (theta + sine * total)
    else:
        for index in range(1, degrees // 2 + 1):
            total += term
            term *= cosine**2 * (2 * index - 1) / (2 * index)
        both = sine * total
    return 0.5 + both / 2
