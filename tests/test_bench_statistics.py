"""The arithmetic of benchmarks: against numpy, scipy, and figures that follow from times chosen by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from toolchain.bench.intervals import intervals, t_interval, t_quantile
from toolchain.bench.records import Measured, Record
from toolchain.bench.statistics import distribution, distribution_ms, percentile, summary
from toolchain.bench.types import Repeat, Settings

PLAIN = Settings(concurrency=(1,))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-9)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50))
def test_distribution_is_numpys(values: list[float]) -> None:
    found = distribution(values)
    assert found is not None and found.count == len(values)
    quantiles = [found.p50, found.p90, found.p95, found.p99]
    assert quantiles == pytest.approx(np.percentile(values, [50, 90, 95, 99]), rel=1e-9, abs=1e-9)
    others = [found.mean, found.std, found.min, found.max]
    expected = [np.mean(values), np.std(values, ddof=1), np.min(values), np.max(values)]
    assert others == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_distribution_is_in_milliseconds() -> None:
    seconds = np.linspace(0.010, 0.110, 101)
    found = distribution_ms(list(seconds))
    assert found is not None
    expected = [*np.percentile(seconds * 1000, [50, 90, 99]), seconds.mean() * 1000, 101]
    assert [found.p50, found.p90, found.p99, found.mean, found.count] == pytest.approx(expected)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 31, 100])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.9995])
def test_quantiles_of_students_t_are_scipys(degrees: int, probability: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(
        stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-9
    )


@given(st.lists(st.floats(0.1, 1e4), min_size=2, max_size=8))
def test_interval_is_scipys(values: list[float]) -> None:
    found = t_interval(values)
    assert found is not None and found.repeats == len(values)
    error = stats.sem(values)
    if error > 1e-9 * found.mean:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


def test_one_repeat_has_no_interval() -> None:
    assert t_interval([3.0]) is None and intervals([]) == {}


def record(
    started_s: float, *pieces: float, tokens: int | None = None, end: float | None = None, **other: object
) -> Record:
    """An answer of ``tokens`` tokens, one for each piece unless said otherwise."""
    finished_s = end if end is not None else (pieces[-1] if pieces else started_s)
    tokens = len(pieces) if tokens is None else tokens
    values = {"started_s": started_s, "finished_s": finished_s, "piece_s": pieces, "prompt_tokens": 10}
    return Record(**{**values, "output_tokens": tokens, **other})  # type: ignore[arg-type]


def summed(*repeats: Measured, settings: Settings = PLAIN, gpus: int | None = None) -> Repeat:
    return Repeat(**summary(repeats, settings=settings, gpus=gpus))


def test_figures_of_two_answers_and_a_failure() -> None:
    records = [
        record(1.0, 1.5, 1.7, 2.1, tokens=4, end=2.2),
        record(2.0, 2.1, tokens=1),
        record(2.0, end=9.0, tokens=0, error="timed out"),
    ]
    found = summed(Measured(records=records, start_s=1.0, end_s=3.0), gpus=2)
    assert (found.requests, found.errors, found.error_messages) == (3, 1, {"timed out": 1})
    assert found.ttft_ms is not None and found.ttft_ms.mean == pytest.approx((500 + 100) / 2)
    assert found.itl_ms is not None and found.itl_ms.mean == pytest.approx((200 + 400) / 2)
    assert found.tpot_ms is not None and found.tpot_ms.mean == pytest.approx(600 / 3)
    assert found.user_tokens_per_s is not None and found.user_tokens_per_s.mean == pytest.approx(3 / 0.6)
    assert found.e2e_ms is not None and found.e2e_ms.mean == pytest.approx((1200 + 100) / 2)
    assert (found.prompt_tokens, found.output_tokens) == (20, 5)
    assert (found.output_tokens_per_s, found.requests_per_s) == (2.5, 1.0)
    assert found.output_tokens_per_s_per_gpu == 1.25


def test_only_what_falls_into_the_window_is_throughput() -> None:
    """Two users without a pause, ten tokens a second each: whatever the window cuts, the rate is 20."""
    records = [
        record(start, *(start + 0.1 * step for step in range(1, 11)), measured=2 <= start < 4)
        for first in (0.05, 0.55)
        for start in (first, first + 1, first + 2, first + 3, first + 4)
    ]
    found = summed(Measured(records=records, start_s=2.0, end_s=5.0))
    assert found.requests == 4 and found.output_tokens == 40
    assert found.output_tokens_per_s == pytest.approx(20.0)
    assert found.requests_per_s == pytest.approx(2.0)


def test_users_in_step_are_not_counted_twice() -> None:
    """100 users that all begin at 0, 1 and 2: 100 requests a second, not the 150 that end within [1, 3]."""
    waves = [
        record(float(wave), wave + 0.5, wave + 1.0, measured=wave > 0)
        for wave in range(3)
        for _ in range(100)
    ]
    found = summed(Measured(records=waves, start_s=1.0, end_s=3.0))
    assert found.requests == 200 and found.requests_per_s == pytest.approx(100.0)


def test_what_still_waits_is_no_throughput_of_an_open_loop() -> None:
    """Ten are due in each second, and five of them answered in it."""
    records = [record(0.1 * n, 0.2 * n + 0.05, 0.2 * n + 0.1) for n in range(100)]
    found = summed(Measured(records=records, start_s=0.0, end_s=10.0, open_loop=True))
    assert found.requests_per_s == pytest.approx(5.0)


def test_repeats_together_are_pooled() -> None:
    one = Measured(records=[record(0.0, 0.1, 0.2)], start_s=0.0, end_s=0.2)
    two = Measured(records=[record(5.0, 5.3, 5.6)], start_s=5.0, end_s=5.6)
    found = summed(one, two)
    assert found.ttft_ms is not None and (found.ttft_ms.min, found.ttft_ms.max) == pytest.approx((100, 300))
    assert found.duration_s == pytest.approx(0.8) and found.output_tokens_per_s == pytest.approx(4 / 0.8)
    spread = intervals([summed(one), summed(two)])
    assert spread["ttft_ms.p50"].mean == pytest.approx(200.0)
    assert spread["output_tokens_per_s"].mean == pytest.approx((2 / 0.2 + 2 / 0.6) / 2)
    half = stats.t.ppf(0.975, 1) * stats.sem([100.0, 300.0])
    assert spread["ttft_ms.p50"].high == pytest.approx(200.0 + half)


def test_waiting_counts_in_an_open_loop() -> None:
    """It was due at 1.0 and sent at 1.4: its user waited from 1.0 on."""
    late = record(1.0, 1.5, 1.6, sent_s=1.4)
    found = summed(Measured(records=[late], start_s=1.0, end_s=2.0))
    assert found.ttft_ms is not None and found.ttft_ms.mean == pytest.approx(500)
    assert found.e2e_ms is not None and found.e2e_ms.mean == pytest.approx(600)


def test_goodput_counts_requests_that_met_both_objectives() -> None:
    records = [
        record(0.0, 0.1, 0.2, 0.3),  # TTFT 100, 100 per token
        record(0.0, 0.3, 0.35, 0.4),  # too late
        record(0.0, 0.1, 0.4, 0.7),  # too slow
        record(0.0, 0.1),  # one token has no ITL
        record(0.0, end=0.5, error="refused"),
    ]
    settings = Settings(concurrency=(1,), ttft_slo_ms=200, itl_slo_ms=150)
    found = summed(Measured(records=records, start_s=0.0, end_s=1.0), settings=settings).goodput
    assert found is not None and (found.requests, found.share) == (2, 2 / 5)
    assert found.requests_per_s == pytest.approx(2.0)
    only = Settings(concurrency=(1,), ttft_slo_ms=200)
    found = summed(Measured(records=records, start_s=0.0, end_s=1.0), settings=only).goodput
    assert found is not None and found.requests == 3
    assert summed(Measured(records=records, start_s=0.0, end_s=1.0)).goodput is None


def test_nothing_but_failures_gives_no_figures() -> None:
    records = [record(0.0, end=1.0, error="down")] * 2
    found = summed(Measured(records=records, start_s=0.0, end_s=1.0))
    assert (found.ttft_ms, found.e2e_ms, found.errors, found.output_tokens_per_s) == (None, None, 2, 0.0)
