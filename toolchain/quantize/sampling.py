"""Which samples of the pool the model is calibrated on: the first ones, as many as the experts need, or balanced.

``balanced`` follows the idea of MoEQuant's expert-balanced sampling (arXiv 2505.03804): calibration data should use
all experts. MoEQuant lets the model write such samples; here they are chosen from real text. The model routes a pool
several times larger once, and samples are taken greedily by what they add to sum(log(1 + tokens)) over all experts of
all layers: a token for an expert that has none weighs most. That sum is monotone and submodular, so greedy choice is
within 1 - 1/e of the best, and gains only shrink, so that a lazily updated heap finds it without scanning the pool.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import torch

from toolchain.core.progress import Progress
from toolchain.plan.types import Calibration
from toolchain.quantize import starved
from toolchain.quantize.calibration import CalibrationSet
from toolchain.quantize.coverage import Coverage
from toolchain.quantize.forward import route

Route = Callable[[CalibrationSet, bool], Coverage]
"""(pool, whole) -> how the unquantized model routes the pool from its start: all of it, or at least until every expert
has the tokens that were asked for."""


def select(
    pool: CalibrationSet, settings: Calibration, *, has_experts: bool, routed: Route, progress: Progress
) -> list[int]:
    """Rows of the pool to calibrate on, in order; deterministic.

    ``routed`` is called only when the answer depends on the model's routing. ToolchainError TC-221 when
    ``settings.strict`` does not accept the experts that stay starved.
    """
    depends = settings.sampling == "balanced" or settings.min_tokens_per_expert > 0 or settings.strict
    first = list(range(min(settings.samples, len(pool.tokens))))
    if not depends:
        return first
    if not has_experts:
        progress.note(
            "the model has no routed experts: expert coverage decides nothing, samples are taken in order"
        )
        return first
    minimum, balanced = settings.min_tokens_per_expert, settings.sampling == "balanced"
    coverage = routed(pool, balanced)
    counts = coverage.matrix()
    if balanced:
        chosen = choose_balanced(counts, samples=len(first), minimum=minimum, limit=settings.max_samples)
    else:
        chosen = list(range(shortest_prefix(counts, len(first), minimum)))
    least = int(counts[chosen].sum(0).min())
    progress.note(
        f"chose {len(chosen)} of {len(counts)} routed samples ({settings.sampling}): the least used expert sees "
        f"{least} tokens{_shortfall(pool, settings, least)}"
    )
    starved.refuse(coverage.of(chosen), settings)
    return chosen


def _shortfall(pool: CalibrationSet, settings: Calibration, least: int) -> str:
    if least >= settings.min_tokens_per_expert:
        return ""
    if settings.sampling == "balanced":
        why = "nothing else of the pool helps, or --calib-max-samples is reached"
    else:
        ended = "--calib-max-samples" if len(pool.tokens) >= settings.max_samples else "the text"
        why = f"{ended} ended before"
    return f", asked for {settings.min_tokens_per_expert}: {why}"


def route_pool(model: Any, settings: Calibration, device: torch.device, progress: Progress) -> Route:
    """A ``Route`` through a model in memory that is not quantized yet."""

    def routed(pool: CalibrationSet, whole: bool) -> Coverage:
        def enough(coverage: Coverage) -> bool:
            drawn = coverage.drawn
            starved_ones = coverage.starved(settings.min_tokens_per_expert)
            return not whole and drawn >= settings.samples and not starved_ones

        batches = pool.batches(settings.batch_size)
        tracked = progress.track(batches, description="route", total=len(batches))
        return route(model, tracked, pool.tokens.shape[1], device, enough=enough)

    return routed


def shortest_prefix(counts: torch.Tensor, samples: int, minimum: int) -> int:
    """Fewest leading rows of ``counts`` [N, M], at least ``samples``, whose sums all reach ``minimum``; else N."""
    reached = (counts.cumsum(0) >= minimum).all(1)
    for count in range(samples, len(counts) + 1):
        if reached[count - 1]:
            return count
    return len(counts)


def choose_balanced(counts: torch.Tensor, *, samples: int, minimum: int = 0, limit: int = 0) -> list[int]:
    """Rows of ``counts`` [N, M] (tokens of a sample for each expert), ascending.

    ``samples`` of them, and more, up to ``limit``, while some column's sum is below ``minimum`` and a row is left that
    helps it.
    """
    greedy = _Greedy(counts)
    greedy.run(torch.log1p, until=lambda: len(greedy.chosen) >= samples)
    greedy.run(
        lambda total: total.clamp(max=minimum),
        until=lambda: len(greedy.chosen) >= limit or bool((greedy.total >= minimum).all()),
    )
    return sorted(greedy.chosen)


class _Greedy:
    """Lazy greedy maximisation of the sum over columns of a concave function of each column's total."""

    def __init__(self, counts: torch.Tensor) -> None:
        self._table = counts.double()
        self.total = torch.zeros(counts.shape[1], dtype=torch.float64)
        self.chosen: list[int] = []

    def run(self, value: Callable[[torch.Tensor], torch.Tensor], *, until: Callable[[], bool]) -> None:
        """Take rows with the largest gain, the earlier of two equal ones, until told or until none gains anything."""

        def gain(row: int) -> float:
            return float((value(self.total + self._table[row]) - value(self.total)).sum())

        taken = set(self.chosen)
        heap = [(-gain(row), row) for row in range(len(self._table)) if row not in taken]
        heapq.heapify(heap)
        while heap and not until():
            _, row = heapq.heappop(heap)
            now = gain(row)
            if heap and (-now, row) > heap[0]:  # others may have overtaken it: gains only shrink
                heapq.heappush(heap, (-now, row))
            elif now > 0:
                self.chosen.append(row)
                self.total += self._table[row]
            else:
                return
