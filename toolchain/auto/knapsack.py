"""One option per group, the least total damage within a budget of bytes: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STATES = 50_000
"""Partial choices that are kept at once. Groups of equal size make equal sums, so models of a few layers stay far below
and are solved exactly."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    picks: tuple[int, ...]
    """Index of the option of each group."""
    size: int
    score: float
    exact: bool
    """False when states had to be dropped: each dropped one was within 1/50,000 of the range of sizes of one kept."""


def solve(
    options: Sequence[Sequence[tuple[int, float]]], budget: int, *, states: int = STATES
) -> Solution | None:
    """``options`` per group: (bytes, score). None when even the smallest options exceed ``budget``.

    Dynamic programming over the Pareto front of (bytes, score); bytes are never rounded, so the budget holds to the
    byte. Of equal scores the smallest wins.
    """
    smallest = [min(size for size, _ in group) for group in options]
    left = sum(smallest)
    if left > budget:
        return None
    sizes, scores = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[np.ndarray, int]] = []
    exact = True
    for group, least in zip(options, smallest, strict=True):
        left -= least
        own_sizes = np.array([size for size, _ in group], dtype=np.int64)
        own_scores = np.array([score for _, score in group], dtype=np.float64)
        total = (sizes[:, None] + own_sizes).ravel()
        score = (scores[:, None] + own_scores).ravel()
        kept = _front(total, score, np.flatnonzero(total + left <= budget))
        if len(kept) > states:
            kept, exact = _thinned(total, kept, states), False
        sizes, scores = total[kept], score[kept]
        history.append((kept, len(group)))
    at = len(sizes) - 1  # along the front, more bytes mean less damage
    size, best, picks = int(sizes[at]), float(scores[at]), []
    for kept, count in reversed(history):
        at, pick = divmod(int(kept[at]), count)
        picks.append(pick)
    return Solution(picks=tuple(reversed(picks)), size=size, score=best, exact=exact)


def _front(sizes: np.ndarray, scores: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Indices of states that no smaller or equal one beats, by size."""
    order = among[np.lexsort((scores[among], sizes[among]))]
    running = np.minimum.accumulate(scores[order])
    better = np.ones(len(order), dtype=bool)
    better[1:] = scores[order][1:] < running[:-1]
    return order[better]


def _thinned(sizes: np.ndarray, front: np.ndarray, states: int) -> np.ndarray:
    """The best of each of ``states`` equal ranges of size, and the smallest state of all."""
    low, high = sizes[front[0]], sizes[front[-1]]
    buckets = (sizes[front] - low) * (states - 2) // max(1, high - low)
    last = np.append(np.flatnonzero(np.diff(buckets)), len(front) - 1)
    return front[np.unique(np.append(last, 0))]
