"""From records of requests to figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from toolchain.bench.records import Measured, Record
from toolchain.bench.types import Distribution, Goodput, Settings


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between order statistics, numpy's default (method 7 of Hyndman and Fan 1996)."""
    return _interpolated(sorted(values), percent)


def _interpolated(ordered: Sequence[float], percent: float) -> float:
    position = (len(ordered) - 1) * percent / 100.0
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def distribution(values: Sequence[float]) -> Distribution | None:
    """Of ``values``, in their unit; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    mean = math.fsum(ordered) / len(ordered)
    squares = math.fsum((value - mean) ** 2 for value in ordered)
    p50, p90, p95, p99 = (_interpolated(ordered, percent) for percent in (50, 90, 95, 99))
    return Distribution(
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        mean=mean,
        std=math.sqrt(squares / (len(ordered) - 1)) if len(ordered) > 1 else 0.0,
        min=ordered[0],
        max=ordered[-1],
        count=len(ordered),
    )


def distribution_ms(seconds: Sequence[float]) -> Distribution | None:
    """Of times in seconds, in milliseconds."""
    return distribution([value * 1000.0 for value in seconds])


def ttft_s(record: Record) -> float | None:
    return record.piece_s[0] - record.started_s if record.piece_s else None


def tpot_s(record: Record) -> float | None:
    """Time per output token after the first; None of an answer of fewer than two tokens."""
    if not record.piece_s or record.output_tokens < 2:
        return None
    return (record.piece_s[-1] - record.piece_s[0]) / (record.output_tokens - 1)


def summary(repeats: Sequence[Measured], *, settings: Settings, gpus: int | None) -> dict[str, Any]:
    """The fields of ``Summary`` for the requests of one repeat, or of several together."""
    records = [record for repeat in repeats for record in repeat.counted]
    good = [record for record in records if record.error is None]
    tpots = [value for record in good if (value := tpot_s(record)) is not None]
    gaps = [later - sooner for record in good for sooner, later in pairwise(record.piece_s)]
    duration_s = math.fsum(repeat.duration_s for repeat in repeats)
    rate = _rate(math.fsum(repeat.tokens_within() for repeat in repeats), duration_s)
    served = _rate(math.fsum(repeat.requests_within() for repeat in repeats), duration_s)
    messages = Counter(record.error for record in records if record.error is not None)
    return {
        "requests": len(records),
        "errors": len(records) - len(good),
        "error_messages": dict(messages.most_common()),
        "duration_s": duration_s,
        "ttft_ms": distribution_ms([value for record in good if (value := ttft_s(record)) is not None]),
        "itl_ms": distribution_ms(gaps),
        "tpot_ms": distribution_ms(tpots),
        "e2e_ms": distribution_ms([record.finished_s - record.started_s for record in good]),
        "prompt_tokens": sum(record.prompt_tokens for record in good),
        "output_tokens": sum(record.output_tokens for record in good),
        "output_tokens_per_s": rate,
        "requests_per_s": served,
        "user_tokens_per_s": distribution([1 / value for value in tpots if value > 0]),
        "output_tokens_per_s_per_gpu": rate / gpus if gpus else None,
        "goodput": goodput(records, settings, served),
        "outstanding_peak": max((repeat.outstanding_peak for repeat in repeats), default=0),
        "held_back": sum(repeat.held_back for repeat in repeats),
    }


def goodput(records: Sequence[Record], settings: Settings, requests_per_s: float) -> Goodput | None:
    """None without objectives. ``requests_per_s``: of successful requests, of which it is the share that met them."""
    ttft_slo_ms, itl_slo_ms = settings.ttft_slo_ms, settings.itl_slo_ms
    if ttft_slo_ms is None and itl_slo_ms is None:
        return None
    met = sum(meets(record, ttft_slo_ms=ttft_slo_ms, itl_slo_ms=itl_slo_ms) for record in records)
    return Goodput(
        ttft_slo_ms=ttft_slo_ms,
        itl_slo_ms=itl_slo_ms,
        requests=met,
        share=met / len(records) if records else 0.0,
        requests_per_s=_rate(requests_per_s * met, sum(record.error is None for record in records)),
    )


def meets(record: Record, *, ttft_slo_ms: float | None, itl_slo_ms: float | None) -> bool:
    """Whether an answer came and met both objectives."""
    if record.error is not None or (first := ttft_s(record)) is None:
        return False
    each = tpot_s(record)
    return (ttft_slo_ms is None or first * 1000 <= ttft_slo_ms) and (
        itl_slo_ms is None or each is None or each * 1000 <= itl_slo_ms
    )


def _rate(count: float, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0
