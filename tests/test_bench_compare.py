"""Comparing results: what chance does is not reported as a difference, what was planted is, unlike is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bench_results import ENGINE, around, figures, level, result
from tests.conftest import Ran
from toolchain.bench.compare.compare import compare
from toolchain.bench.compare.sides import Side, read_side
from toolchain.bench.compare.significance import adjusted, from_repeats, from_requests
from toolchain.bench.results import write_result
from toolchain.core.errors import FindingsError, UsageError

TTFT = ("ttft_ms.p50",)


def side(*repeats: float, users: int = 4, **changes: Any) -> Side:
    """TTFT of each repeat; the other figures stay as they are."""
    return Side("x", (result([level(users, [figures(ttft=value) for value in repeats])], **changes),))


def lognormal(generator: np.random.Generator, mean: float, noise: float, count: int) -> list[float]:
    return list(mean * np.exp(generator.normal(0, noise, count)))


def test_chance_is_found_as_often_as_the_level_says_and_intervals_hold_the_truth() -> None:
    generator, tries = np.random.default_rng(0), 600
    false, covered = 0, 0
    for _ in range(tries):
        a, b = (lognormal(generator, mean, 0.03, 4) for mean in (10.0, 11.0))
        same = lognormal(generator, 10.0, 0.03, 4)
        false += (from_repeats(a, same).p or 0.0) < 0.05
        found = from_repeats(a, b)
        covered += found.low is not None and found.high is not None and found.low < 1.1 < found.high
    # Three standard errors of a share of 0.05, or 0.95, of 600.
    assert abs(false / tries - 0.05) < 3 * (0.05 * 0.95 / tries) ** 0.5
    assert abs(covered / tries - 0.95) < 3 * (0.05 * 0.95 / tries) ** 0.5


def test_the_ratio_of_means_over_requests_agrees_with_a_bootstrap() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.gamma(8, 2, 200), generator.gamma(8, 2.3, 150)
    one, other = (
        around(float(values.mean()), std=float(values.std(ddof=1)), count=len(values)) for values in (a, b)
    )
    found = from_requests(one, other)
    drawn = [generator.choice(b, len(b)).mean() / generator.choice(a, len(a)).mean() for _ in range(4000)]
    assert found.basis == "requests" and found.ratio == pytest.approx(b.mean() / a.mean())
    assert [found.low, found.high] == pytest.approx(list(np.quantile(drawn, [0.025, 0.975])), rel=0.01)


def test_adjustment_of_the_example_of_benjamini_and_hochberg() -> None:
    # Table 1 of the paper (1995): with a false discovery rate of 0.05, the first four of fifteen are rejected.
    p = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.3240,
        0.4262,
        0.5719,
        0.6528,
    ]
    p += [0.7590, 1.0]
    assert sum(value <= 0.05 for value in adjusted(p)) == 4
    assert adjusted([]) == []


def test_a_planted_slowdown_fails_the_gate_and_a_small_one_does_not() -> None:
    a = side(10.0, 10.1, 9.9, 10.05)
    (row,) = compare(a, side(11.0, 11.1, 10.9, 11.05), figures=TTFT, limit=0.05).rows
    assert (row.verdict, row.gate) == ("slower", "failed")
    assert row.slower_by[0] == pytest.approx(0.1, rel=0.01)
    # Significant, but less than the limit.
    (row,) = compare(a, side(10.3, 10.4, 10.25, 10.35), figures=TTFT, limit=0.05).rows
    assert (row.verdict, row.gate) == ("slower", "passed")
    (row,) = compare(side(11.0, 11.1, 10.9), a, figures=TTFT, limit=0.05).rows
    assert (row.verdict, row.gate) == ("faster", "passed")


def test_noise_is_no_difference_and_too_much_of_it_is_undecided() -> None:
    comparison = compare(side(10.0, 14.0, 8.0), side(12.0, 9.0, 15.0), figures=TTFT, limit=0.05)
    (row,) = comparison.rows
    assert (row.verdict, row.gate) == ("no significant difference", "undecided")
    assert not comparison.failed and comparison.gates == {"failed": 0, "passed": 0, "undecided": 1}


def test_one_run_each_cannot_tell() -> None:
    (row,) = compare(side(10.0), side(20.0), figures=TTFT, limit=0.05).rows
    assert (row.verdict, row.gate, row.estimate.p) == ("cannot tell", "undecided", None)
    assert "--repeats" in row.why and row.slower_by[0] == pytest.approx(1.0)
    # Means have a spread between requests; it does not hold what differs from run to run, so no gate rests on it.
    a, b = (Side("x", (result([level(1, [figures(ttft=t, std=0.5)])]),)) for t in (10.0, 12.0))
    (row,) = compare(a, b, figures=("ttft_ms.mean",), limit=0.05).rows
    assert (row.verdict, row.gate) == ("slower", "undecided") and "within one run" in row.why


def test_rates_are_slower_when_they_fall() -> None:
    fast, slow = (
        Side("x", (result([level(1, [figures(rate=rate * each) for each in (1.0, 1.001, 0.999)])]),))
        for rate in (500.0, 400.0)
    )
    (row,) = compare(fast, slow, figures=("output_tokens_per_s",), limit=0.05).rows
    assert (row.verdict, row.gate) == ("slower", "failed") and row.slower_by[0] == pytest.approx(
        0.2, rel=0.01
    )
    low, high = row.slower_by[1:]
    assert low is not None and high is not None and low < 0.2 < high


def test_repeats_of_several_files_count_together() -> None:
    several = Side("x", (*side(10.0).results, *side(10.2).results, *side(9.9, 10.1).results))
    (row,) = compare(several, side(12.0, 12.1), figures=TTFT).rows
    assert row.estimate.repeats == (4, 2) and row.verdict == "slower"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"prompt_tokens": 128}}, "prompt_tokens"),
        ({"settings": {"output_tokens": "normal:32,4"}}, "output_tokens"),
        ({"environment": {"gpus": ["NVIDIA H200"]}}, "gpus"),
        ({"environment": {"cpu": "Xeon"}}, "cpu"),
        ({"engine": {**ENGINE, "model": "b" * 64}}, "model"),
        ({"target": "triton-http"}, "target"),
        ({"tool": "aiperf"}, "tool"),
    ],
)
def test_what_was_not_measured_alike_is_named_and_refused(changes: dict[str, Any], words: str) -> None:
    a, b = side(10.0, 10.1), side(10.0, 10.1, **changes)
    with pytest.raises(FindingsError) as refused:
        compare(a, b)
    assert refused.value.code == "TC-715"
    assert [finding.where for finding in refused.value.findings if finding.severity == "error"] == [words]
    assert any(finding.where == words for finding in compare(a, b, force=True).findings)


def test_other_loads_and_failed_requests_are_refused() -> None:
    with pytest.raises(FindingsError) as refused:
        compare(
            Side("a", (result([level(1, [figures()]), level(4, [figures()])]),)),
            side(10.0, users=4),
            figures=TTFT,
        )
    assert any("1 user only in A" in str(finding) for finding in refused.value.findings)
    with pytest.raises(UsageError, match="no load is in both"):
        compare(side(10.0, users=1), side(10.0, users=4), force=True)
    failed = Side("b", (result([level(4, [figures(errors=3)])]),))
    with pytest.raises(FindingsError) as refused:
        compare(side(10.0), failed)
    assert any("3 requests failed" in str(finding) for finding in refused.value.findings)
    with pytest.raises(UsageError, match="unknown figure ttft") as unknown:
        compare(side(10.0), side(10.0), figures=("ttft",))
    assert "ttft_ms.p50" in unknown.value.hint


def write(directory: Path, name: str, ttfts: Sequence[float], **changes: Any) -> Path:
    path = directory / name
    write_result(path, side(*ttfts, **changes).first)
    return path


def test_the_command_fails_only_for_a_slowdown_beyond_the_limit(
    tmp_path: Path, toolchain: Callable[..., Ran]
) -> None:
    a = write(tmp_path, "a.json", [10.0, 10.1, 9.9])
    b = write(tmp_path, "b.json", [11.0, 11.1, 10.9])
    ran = toolchain("bench", "compare", a, b, "--json")
    assert ran.status == 0 and ran.json["gates"] == {}
    ran = toolchain("bench", "compare", a, b, "--fail-if-slower", "5%", "--metric", "ttft_ms.p50", "--json")
    assert ran.status == 1 and ran.json["gates"] == {"failed": 1, "passed": 0, "undecided": 0}
    ran = toolchain("bench", "compare", a, b, "--fail-if-slower", "0.15", "--metric", "ttft_ms.p50")
    assert ran.status == 0 and "passed" in ran.out and "10.0% slower" in ran.out
    for share in ("five", "-1%", "200%"):
        assert toolchain("bench", "compare", a, b, "--fail-if-slower", share).status == 2


def test_memory_of_both_stands_beside_their_speed(tmp_path: Path, toolchain: Callable[..., Ran]) -> None:
    before = {**ENGINE, "format": "source", "checkpoint_bytes": 4 * 2**20, "manifest_sha256": None}
    after = {**ENGINE, "checkpoint_bytes": 2**20}
    peak = {"memory": {"process_peak_bytes": 3 * 2**20}}
    a = write(tmp_path, "a.json", [10.0, 10.1], engine=before)
    b = write(tmp_path, "b.json", [10.0, 10.1], engine=after, environment=peak)
    ran = toolchain("bench", "compare", a, b)
    assert ran.status == 0, ran.err
    (line,) = (line for line in ran.out.splitlines() if "checkpoint" in line)
    assert line.split() == ["memory", "checkpoint", "4.00", "MiB", "1.00", "MiB", "0.250"]
    assert "3.00 MiB" in ran.out and "built again or differently" in ran.err


def test_directories_engines_and_lists_are_sides(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write(tmp_path / "runs", f"{name}.json", [10.0])
        write(tmp_path / "engine" / "bench", f"{name}.json", [10.0])
    assert len(read_side(str(tmp_path / "runs")).results) == 2
    assert len(read_side(str(tmp_path / "engine")).results) == 1
    assert len(read_side(f"{tmp_path / 'runs' / '1.json'},{tmp_path / 'engine'}").results) == 2
    for missing in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(UsageError) as refused:
            read_side(str(missing))
        assert refused.value.code == "TC-714"
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UsageError) as refused:
        read_side(str(tmp_path / "other.json"))
    assert refused.value.code == "TC-706"
