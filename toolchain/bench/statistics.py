"""From records of requests to the figures of one concurrency."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from toolchain.bench.types import Distribution, Level, Record


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between order statistics, numpy's default (method 7 of Hyndman and Fan 1996)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100.0
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def distribution_ms(seconds: Sequence[float]) -> Distribution | None:
    """Percentiles and mean in milliseconds; None of nothing."""
    if not seconds:
        return None
    p50, p90, p99 = (percentile(seconds, percent) * 1000.0 for percent in (50, 90, 99))
    return Distribution(
        p50=p50, p90=p90, p99=p99, mean=math.fsum(seconds) / len(seconds) * 1000.0, count=len(seconds)
    )


def summarise(records: Sequence[Record], *, concurrency: int, duration_s: float, warmup_errors: int) -> Level:
    """The figures of ``records``, which were measured within ``duration_s``."""
    good = [record for record in records if record.error is None]
    spoken = [record for record in good if record.piece_s]
    messages = Counter(record.error for record in records if record.error is not None)
    output_tokens = sum(record.output_tokens for record in good)
    return Level(
        concurrency=concurrency,
        requests=len(records),
        errors=len(records) - len(good),
        error_messages=dict(messages.most_common()),
        warmup_errors=warmup_errors,
        duration_s=duration_s,
        ttft_ms=distribution_ms([record.piece_s[0] - record.started_s for record in spoken]),
        itl_ms=distribution_ms(
            [later - sooner for record in spoken for sooner, later in pairwise(record.piece_s)]
        ),
        tpot_ms=distribution_ms(
            [
                (record.piece_s[-1] - record.piece_s[0]) / (record.output_tokens - 1)
                for record in spoken
                if record.output_tokens > 1
            ]
        ),
        e2e_ms=distribution_ms([record.finished_s - record.started_s for record in good]),
        prompt_tokens=sum(record.prompt_tokens for record in good),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / duration_s,
        requests_per_s=len(good) / duration_s,
    )
