"""The report's trade-off plot and its before/after tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench_results import ENGINE, figures, level, result
from tests.report_engines import make_engine
from tests.test_report import report
from toolchain.bench.results import write_result
from toolchain.report.comparison import write_comparison
from toolchain.report.engine import write_report
from toolchain.report.trade_off import Served, alike, front, served, trade_off

BEFORE = {**ENGINE, "format": "source", "manifest_sha256": None, "checkpoint_bytes": 4 * 2**20}


def levels(speed: float, **changes: Any) -> list[Any]:
    """Of 1 and 4 users; ``speed`` divides the time per token and multiplies the rates."""
    return [
        level(
            users,
            [
                figures(
                    ttft=10 * noise,
                    tpot=(2 + users) / speed * noise,
                    rate=users * 200 * speed / noise,
                    **changes,
                )
                for noise in (1.0, 1.01, 0.99)
            ],
            **changes,
        )
        for users in (1, 4)
    ]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    directory = make_engine(tmp_path / "mine", bench=False)
    write_result(directory / "bench" / "20261121T100000Z.json", result(levels(2.0)))
    return directory


def html_of(engine: Path) -> str:
    """With what only those hear who do not see the picture."""
    return write_report(engine).read_text()


def test_every_load_is_a_point_with_both_its_figures(engine: Path) -> None:
    document = json.loads(next((engine / "bench").glob("*.json")).read_text())
    points = served(document, "mine")
    assert [(point.load, point.user, point.rate, point.per_gpu) for point in points] == [
        ("1 user", pytest.approx(1000 / 1.5), pytest.approx(400), False),
        ("4 users", pytest.approx(1000 / 3), pytest.approx(1600), False),
    ]
    html = html_of(engine)
    assert "tokens/s of the machine (no GPU)" in html
    assert "mine with 4 users: 333 and 1,600, on the front" in html


def test_results_of_the_first_schema_have_points_too() -> None:
    old = {
        "environment": {"gpus": []},
        "levels": [{"concurrency": 2, "tpot_ms": {"p50": 4.0}, "output_tokens_per_s": 300.0}],
    }
    (point,) = served(old, "old")
    assert (point.user, point.rate, point.load) == (250.0, 300.0, "2 users")
    # Without a count of GPUs nobody knows what a GPU gives; nonsense has no points.
    assert served({**old, "environment": {"gpus": ["NVIDIA H200"]}}, "old") == []
    assert served({"levels": "no", "environment": 3}, "x") == []


def test_figures_per_gpu_are_not_mixed_with_those_of_a_machine_without() -> None:
    points = [
        Served(
            series=name, load=f"{users} users", size=users, user=100 / users, rate=90.0 * users, per_gpu=gpu
        )
        for name, gpu in (("cpu", False), ("gpu", True))
        for users in (1, 2)
    ]
    figure, listed = trade_off(points)
    assert "cpu with" not in figure.alt and "Not drawn: 1 more" in figure.note  # type: ignore[union-attr]
    assert {row[0].text for row in listed.rows} == {"gpu"}  # type: ignore[union-attr]
    assert trade_off(points[:1]) == ()


loads = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=9)


@given(loads)
def test_no_point_beats_one_on_the_front(found: list[tuple[int, int]]) -> None:
    points = [
        Served(series=str(index), load="", size=0, user=user, rate=rate, per_gpu=True)
        for index, (user, rate) in enumerate(found)
    ]
    best = {(point.user, point.rate) for point in front(points)}
    expected = {
        (user, rate)
        for user, rate in found
        if not any((u > user and r >= rate) or (u >= user and r > rate) for u, r in found)
    }
    assert best == expected


def test_before_and_after_stand_in_one_table(engine: Path) -> None:
    write_result(
        engine / "bench" / "source" / "before.json",
        result(levels(1.0), engine=BEFORE, environment={"memory": {"process_peak_bytes": 8 * 2**20}}),
    )
    page = report(engine)
    for words in ("4.00 MiB", "8.00 MiB", "0.50", "faster"):
        assert words in page.text, words
    assert "not measured alike" not in page.text
    assert "source model with 1 user" in html_of(engine)


def test_a_source_model_that_was_measured_otherwise_is_said(engine: Path) -> None:
    other = result(levels(1.0), engine=BEFORE, settings={"prompt_tokens": 128}, target="inprocess")
    write_result(engine / "bench" / "source" / "before.json", other)
    text = report(engine).text
    assert "These two were not measured alike" in text and "prompt_tokens: 128 in A, 64 in B" in text
    assert "source model with" not in html_of(engine)  # and its line is not in the plot


def test_without_the_source_model_the_command_is_named(engine: Path) -> None:
    text = report(engine).text
    assert (
        "The source model was not measured: run toolchain bench Qwen/Qwen3-30B-A3B --output mine/bench/source"
        in text
    )
    (engine / "bench" / "source").mkdir()
    (engine / "bench" / "source" / "before.json").write_text('{"a": 1}')
    assert "Not compared" in report(engine).text


def test_several_engines_share_one_plot(engine: Path, tmp_path: Path) -> None:
    other = make_engine(tmp_path / "other", bench=False)
    write_result(other / "bench" / "1.json", result(levels(0.5)))
    html = write_comparison([engine, other], tmp_path / "out").read_text()
    assert "mine with 1 user: 667 and 400, on the front" in html and "other with 1 user" in html


def test_conditions_that_matter_make_benchmarks_unlike() -> None:
    a, b = (result(levels(1.0), **changes).to_json() for changes in ({}, {"target": "openai"}))
    assert alike([a, a]) and not alike([a, b])
