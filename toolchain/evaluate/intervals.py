"""95 % confidence intervals by bootstrap over windows: tokens of one window depend on each other, windows hardly do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
_AT_A_TIME = 100
"""Resamples whose window counts are held at once: [100, windows] float64."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""[resamples, figures] means -> [resamples] of what the interval is about."""


def resampled_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[windows, figures] sums and [windows] counts -> [RESAMPLES, figures] means of windows drawn with replacement."""
    generator, windows = np.random.default_rng(SEED), len(sums)
    means = []
    for _ in range(RESAMPLES // _AT_A_TIME):
        drawn = generator.multinomial(windows, np.full(windows, 1 / windows), size=_AT_A_TIME).astype(float)
        means.append((drawn @ sums) / (drawn @ counts)[:, None])
    return np.concatenate(means)


def interval(values: np.ndarray) -> list[float]:
    """[low, high] of [resamples] values: the percentile method."""
    tail = (1 - LEVEL) / 2
    return [float(bound) for bound in np.quantile(values, [tail, 1 - tail])]
