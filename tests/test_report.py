"""Reports as documents: what they say, what they refuse, and that they are the same each time."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Made, Ran
from tests.report_engines import SHA, change, make_engine, write
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.evaluate.gates import Gates, apply_gates
from toolchain.evaluate.harness.kept import keep_tasks
from toolchain.report import write_comparison, write_report
from toolchain.report.pareto import Point, front

Run = Callable[..., Ran]


class Seen(HTMLParser):
    """Text, scripts and addresses of a page, as an HTML parser that is not ours reads them."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            str(value) for name, value in attrs if name in ("src", "href", "action", "xlink:href")
        ]
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_engine(tmp_path_factory.mktemp("report") / "moe")


def report(engine: Path) -> Seen:
    return Seen(write_report(engine))


def test_it_says_what_was_measured(engine: Path) -> None:
    metrics = json.loads((engine / "metrics.json").read_text())
    text = report(engine).text
    low, high = metrics["intervals"]["kl_mean"]
    assert f"95 %: {low:.3g} to {high:.3g}" in text
    assert f"{100 * metrics['top1_agreement']:.2f} %" in text
    assert f"{metrics['ppl']:.3f}" in text
    assert f"{1 - metrics['top1_agreement']:.4f}"[:3] == "0.0"
    assert "98,112 tokens" in text
    assert "Fit to serve: all 2 gates passed" in text
    assert "First difference: token 5 of 48." in text
    assert "toolchain engine Qwen/Qwen3-30B-A3B --format nvfp4 --calib-data 'my chats.jsonl'" in text


def test_training_is_told_with_its_curve(tmp_path: Path, engine: Path) -> None:
    page = write_report(make_engine(tmp_path / "trained", training=True)).read_text()
    for said in (
        "0.0089",
        "before training 0.0201",
        "distillation",
        "200 of 400",
        "819,200",
        SHA,
        "chats.jsonl",
    ):
        assert said in page
    assert "KL divergence from the teacher on held-out text while training" in page
    assert "did not improve" not in page
    assert "before training" not in write_report(engine).read_text()  # nothing was trained there


def test_training_without_gain_is_a_warning(tmp_path: Path) -> None:
    made = make_engine(tmp_path / "trained", training=True)
    manifest = made / "checkpoint" / "quantize.json"
    training = {**json.loads(manifest.read_text())["training"], "improved": False}
    change(manifest, training=training)
    assert "no better than without it" in write_report(made).read_text()


def test_it_is_one_file_that_points_nowhere_else(engine: Path) -> None:
    page = report(engine)
    assert [address for address in page.addresses if not address.startswith("#")] == []
    assert not {"link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    assert "url(" not in (engine / "report" / "index.html").read_text().split("</style>")[0]


def test_a_large_model_stays_small(tmp_path: Path) -> None:
    engine = make_engine(tmp_path / "big", layers=94, experts=128)
    assert write_report(engine).stat().st_size < 2_000_000


def test_many_experts_share_columns_and_the_page_says_so(tmp_path: Path) -> None:
    page = report(make_engine(tmp_path / "many", layers=3, experts=384))
    assert "A column is the mean of 2 of the 384 experts, or starved where one of them is." in page.text


def test_the_same_inputs_give_the_same_bytes(engine: Path, tmp_path: Path) -> None:
    first = write_report(engine).read_bytes()
    assert write_report(engine).read_bytes() == first
    script = f"from pathlib import Path; from toolchain.report import write_report; write_report(Path({str(engine)!r}))"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (engine / "report" / "index.html").read_bytes() == first


def test_what_is_missing_is_said_in_a_line(tmp_path: Path, engine: Path) -> None:
    write(tmp_path / "bare" / "plan.json", json.loads((engine / "plan.json").read_text()))
    page = report(tmp_path / "bare")
    for words in (
        "No verdict: quality was not measured",
        "Quality was not measured: run toolchain evaluate bare",
        "Coverage was not measured: coverage.json is not beside the checkpoint",
        "Sensitivity was not measured: run toolchain sensitivity Qwen/Qwen3-30B-A3B",
        "KL was not measured",
        "Router agreement was not measured",
        "The written bytes were not measured: run toolchain verify bare",
        "Generations were not measured",
        "Tasks were not measured",
        "Speed was not measured: run toolchain bench bare",
    ):
        assert words in page.text
    assert page.tags.count("figure") == 2  # formats and planned bytes


def test_a_dense_model_has_no_experts_to_report_on(tmp_path: Path) -> None:
    text = report(make_engine(tmp_path / "dense", experts=0)).text
    assert "This model has no routed experts." in text
    assert "This model has no router." in text


def test_metrics_of_the_first_schema(engine: Path, tmp_path: Path) -> None:
    metrics = json.loads((engine / "metrics.json").read_text())
    old = {
        key: metrics[key]
        for key in ("tokens", "ppl", "baseline_ppl", "kl_mean", "kl_median", "kl_p99", "data")
    }
    by_layer = {
        "top1_agreement": 0.93,
        "router_agreement": 0.98,
        "router_agreement_by_layer": [1.0, 0.99, 0.98, 0.95],
    }
    write(tmp_path / "old" / "metrics.json", {**old, **by_layer})
    page = report(tmp_path / "old")
    assert f"{100 * (metrics['ppl'] / metrics['baseline_ppl'] - 1):+.2f} %" in page.text
    assert "No gates were set" in page.text
    assert "The histogram was not measured" in page.text


ODD = (None, "many", "", [], {}, [None], True, float("nan"), float("inf"), -1, 0, 1e-300, 10**400)


@pytest.mark.parametrize("seed", range(12))
def test_values_that_are_no_measurement_do_not_break_it(tmp_path: Path, seed: int) -> None:
    """Documents of other versions, of people, of interrupted writes: anything may stand anywhere."""
    draw = random.Random(seed)
    engine = make_engine(tmp_path / "engine", layers=3, experts=4)
    for path in sorted(engine.rglob("*.json")):
        spoilt = spoil(json.loads(path.read_text()), draw)
        write(path, spoilt if isinstance(spoilt, dict) else {})
    text = report(engine).text
    assert re.search(r"\b(nan|inf|None)\b", text) is None
    whole = make_engine(tmp_path / "whole")
    assert "2 engines compared" in Seen(write_comparison([engine, whole], tmp_path / "compared")).text


def spoil(value: Any, draw: random.Random) -> Any:
    """``value`` with about one in twenty of its parts replaced."""
    if draw.random() < 0.05:
        return draw.choice(ODD)
    if isinstance(value, dict):
        return {key: spoil(item, draw) for key, item in value.items()}
    return [spoil(item, draw) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("changes", "headline"),
    [
        ({"gates": [], "fit": True}, "No gates were set"),
        (
            {"gates": [{"gate": "max_kl", "limit": 0.001, "value": 0.0048, "passed": False}], "fit": False},
            "1 of 1 gates",
        ),
        ({"fit": False, "gates": []}, "Not fit to serve"),
        ({"measured": False, "ppl": None}, "No verdict"),
    ],
)
def test_verdicts(tmp_path: Path, changes: dict[str, Any], headline: str) -> None:
    assert headline in report(make_engine(tmp_path / "engine", changes=changes)).text


def test_scores_of_a_format_search_are_shown_as_sensitivity(tmp_path: Path) -> None:
    engine = make_engine(tmp_path / "engine", sensitivity=False)
    groups = [
        ("0.routed_expert", "nvfp4", 0.00071),
        ("0.routed_expert", "source", 0.0),
        ("1.attention", "fp8", 0.00023),
    ]
    scores = [{"group": group, "format": name, "bytes": 10, "score": score} for group, name, score in groups]
    write(engine / "auto.json", {"method": "sensitivity", "scores": scores})
    text = report(engine).text
    assert "The 2 most sensitive of 2 layer groups" in text
    assert "0.routed_expert nvfp4 0.000710" in text


def test_gates_and_tasks_count_for_the_bytes_that_were_judged(tmp_path: Path) -> None:
    """As `toolchain triton` counts them."""
    engine = make_engine(tmp_path / "engine", changes={"tasks": None})
    change(engine / "engine.json", files={"checkpoint/model.safetensors": "aa", "plan.json": "bb"})
    metrics = json.loads((engine / "metrics.json").read_text())
    apply_gates(engine, metrics, Gates(max_kl=0.001))
    document = {
        "harness": "0.4.9",
        "settings": {},
        "results": {
            "piqa": {"metrics": {"acc": {"value": 0.7312, "stderr": 0.01}}, "num_fewshot": 0, "samples": 100}
        },
        "groups": {},
    }
    keep_tasks(engine, document)
    text = report(engine).text
    assert "Not fit to serve: 1 of 1 gates failed" in text
    assert "mean KL 0.00480 at most 0.001 failed" in text
    assert "73.12 %" in text
    change(engine / "engine.json", files={"checkpoint/model.safetensors": "cc", "plan.json": "bb"})
    text = report(engine).text
    assert "Fit to serve: all 2 gates passed" in text  # those of metrics.json
    assert "gates.json is of other bytes than this engine has now, and is left out." in text
    assert "73.12 %" not in text


def test_a_failed_audit_outweighs_passed_gates(tmp_path: Path) -> None:
    engine = make_engine(tmp_path / "engine")
    finding = {"code": "TC-316", "where": "a", "message": "scale is not finite", "severity": "error"}
    change(engine / "verify.json", passed=False, findings=[finding])
    text = report(engine).text
    assert "Not fit to serve: the written bytes failed their audit" in text
    assert "TC-316: scale is not finite." in text


def test_a_benchmark_of_an_earlier_build_is_marked(tmp_path: Path) -> None:
    engine = make_engine(tmp_path / "engine")
    bench = next((engine / "bench").iterdir())
    words = "measured on an earlier build of the engine"
    environment = json.loads(bench.read_text())["environment"]
    for digest, stale in ((sha256(engine / "engine.json"), False), ("0" * 64, True)):
        change(bench, environment={**environment, "engine": {"name": "engine", "manifest_sha256": digest}})
        assert (words in report(engine).text) == stale


def sha256(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_markup_in_text_stays_text(tmp_path: Path) -> None:
    prompt = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    pair = {"prompt": prompt, "baseline": prompt, "quantized": prompt, "tokens": 3, "first_difference": None}
    engine = make_engine(tmp_path / "engine", changes={"generations": [pair]})
    plain = report(make_engine(tmp_path / "plain"))
    page = report(engine)
    assert page.words.count(prompt) == 3
    assert page.tags.count("script") == plain.tags.count("script")
    assert "img" not in page.tags


def test_damaged_files_are_named_and_the_older_report_stays(tmp_path: Path) -> None:
    engine = make_engine(tmp_path / "engine")
    before = write_report(engine).read_bytes()
    (engine / "verify.json").write_text('{"passed": tr')
    with pytest.raises(ToolchainError, match=r"verify.json is not valid JSON") as damaged:
        write_report(engine)
    (engine / "verify.json").write_text("[1, 2]")
    with pytest.raises(ToolchainError, match=r"verify.json holds a JSON list") as foreign:
        write_report(engine)
    assert (damaged.value.code, foreign.value.code) == ("TC-003", "TC-802")
    assert (engine / "report" / "index.html").read_bytes() == before
    assert [path.name for path in (engine / "report").iterdir()] == ["index.html"]


# several engines


def test_a_comparison_shows_every_engine(tmp_path: Path, engine: Path) -> None:
    other = make_engine(tmp_path / "fp8", format="fp8", kl=0.0009)
    worse = make_engine(tmp_path / "int4", format="int4_awq", kl=0.02)
    text = Seen(write_comparison([engine, other, worse], tmp_path / "out")).text
    assert "2 fit to serve, 1 not fit to serve" in text
    assert all(name in text for name in ("moe", "fp8", "int4", "0.000900", "0.00480", "0.0200"))
    assert "not measured alike" not in text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("token_hash", "0" * 64, "token hash"), ("window", 1024, "window"), ("stride", 256, "stride")],
)
def test_figures_on_different_data_are_kept_apart(
    tmp_path: Path, engine: Path, key: str, value: Any, words: str
) -> None:
    data = json.loads((engine / "metrics.json").read_text())["data"]
    other = make_engine(tmp_path / "other", format="fp8", kl=0.0009, changes={"data": {**data, key: value}})
    text = Seen(write_comparison([engine, other], tmp_path / "out")).text
    assert "These figures were not measured alike" in text
    assert f"What differs: {words}." in text
    assert "measured alike: A" in text


def test_benchmarks_of_different_machines_are_warned_of(tmp_path: Path, engine: Path) -> None:
    other = make_engine(tmp_path / "other")
    bench = next((other / "bench").iterdir())
    environment = json.loads(bench.read_text())["environment"]
    change(bench, environment={**environment, "gpus": ["NVIDIA H200"]})
    assert "their figures do not compare" in Seen(write_comparison([engine, other], tmp_path / "out")).text


points = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from("AB")), min_size=1, max_size=9
)


@given(points)
def test_the_front_is_what_no_other_beats(found: list[tuple[int, int, str]]) -> None:
    """On the front: no engine of its group with fewer bits has as little KL, and none of as many bits has less."""
    drawn = [
        Point(name=str(index), bits=bits, kl=kl, interval=None, group=group)
        for index, (bits, kl, group) in enumerate(found)
    ]
    for point in drawn:
        alike = [other for other in drawn if other.group == point.group]
        best_below = min((other.kl for other in alike if other.bits < point.bits), default=float("inf"))
        best_here = min(other.kl for other in alike if other.bits == point.bits)
        assert (point.name in front(drawn)) == (point.kl == best_here and point.kl < best_below)


def test_engines_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = [make_engine(tmp_path / place / "mine") for place in ("a/x", "b/x", "c/y")]
    assert "x/mine, y/mine" in Seen(write_comparison(places[1:], tmp_path / "out")).text
    text = Seen(write_comparison(places, tmp_path / "out")).text
    assert all(str(place) in text for place in places)


def test_a_comparison_needs_different_engines(tmp_path: Path, engine: Path) -> None:
    for engines in ([engine], [engine, engine]):
        with pytest.raises(UsageError) as refused:
            write_comparison(engines, tmp_path / "out")
        assert refused.value.code == "TC-803"
    assert not (tmp_path / "out").exists()


# the command


def test_the_command_writes_and_replaces_its_own_page(toolchain: Run, tmp_path: Path) -> None:
    engine = make_engine(tmp_path / "engine")
    dry = toolchain("report", engine, "--dry-run", "--json")
    assert dry.status == 0
    assert dry.json["bytes"] is None
    assert not (engine / "report").exists()
    done = toolchain("report", engine, "--json")
    page = engine / "report" / "index.html"
    assert done.json == {"report": str(page), "engines": [str(engine)], "bytes": page.stat().st_size}
    assert toolchain("report", engine).status == 0
    page.write_text("<p>mine</p>")
    refused = toolchain("report", engine)
    assert (refused.status, page.read_text()) == (2, "<p>mine</p>")
    assert "TC-004" in refused.err
    assert toolchain("report", engine, "--force").status == 0
    assert "<p>mine</p>" not in page.read_text()


def test_the_command_compares(toolchain: Run, tmp_path: Path) -> None:
    engines = [make_engine(tmp_path / name, kl=kl) for name, kl in (("a", 0.002), ("b", 0.004))]
    assert "TC-803" in toolchain("report", *engines).err
    done = toolchain("report", *engines, "--output", tmp_path / "out", "--json")
    assert done.status == 0
    assert "2 engines compared" in Seen(tmp_path / "out" / "index.html").text


def test_the_command_refuses_what_is_no_engine(toolchain: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "none"):
        refused = toolchain("report", place, "--json")
        assert (refused.status, refused.json["error"]["code"]) == (2, "TC-801")
    assert not (tmp_path / "empty" / "report").exists()


def test_importing_the_room_loads_no_chart_library() -> None:
    script = (
        "import sys, toolchain.report; print({'altair', 'vl_convert', 'jinja2', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_engine_that_was_really_made(made: Made, tmp_path: Path) -> None:
    copy = made.copy_to(tmp_path)
    metrics = json.loads((copy.engine / "metrics.json").read_text())
    page = report(copy.engine)
    assert f"{metrics['tokens']:,} tokens" in page.text
    assert f"{100 * metrics['top1_agreement']:.2f} %" in page.text
    assert {"figure", "svg", "table"} <= set(page.tags)
