"""Gates: limits on what quantization may cost, and what becomes of an engine that fails one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import Made, Ran
from toolchain.core.errors import UsageError
from toolchain.evaluate.gates import Gates, judge

Run = Callable[..., Ran]


@pytest.fixture
def mine(made: Made, tmp_path: Path, toolchain: Run) -> Made:
    """A copy of the engine, settled: its paths are those of the copy."""
    copy = made.copy_to(tmp_path)
    assert toolchain(*copy.command).status == 0
    return copy


def gates_of(made: Made) -> dict[str, object]:
    return json.loads((made.engine / "gates.json").read_text())


def metrics_of(made: Made) -> dict[str, float]:
    return json.loads((made.engine / "metrics.json").read_text())


def test_an_engine_that_fails_a_gate_is_kept_marked_and_not_served(mine: Made, toolchain: Run) -> None:
    kl = metrics_of(mine)["kl_mean"]
    failed = toolchain(*mine.command, "--max-kl", kl / 2, "--json")
    assert failed.status == 1 and failed.json["error"]["code"] == "TC-532"
    message = failed.json["error"]["findings"][0]["message"]
    assert "kl_mean" in message and "--max-kl asks for at most" in message
    assert (mine.engine / "engine.json").is_file(), "people want to look at it"
    assert not mine.repository.exists(), "what was rendered before would serve it"
    assert gates_of(mine)["fit"] is False
    for words in (("triton", mine.engine, "--output", mine.repository), ("serve", mine.engine, "--dry-run")):
        refused = toolchain(*words, "--json")
        assert refused.status == 1 and refused.json["error"]["code"] == "TC-532", words
        assert toolchain(*words, "--dry-run", "--allow-unfit").status == 0, words
    assert toolchain("triton", mine.engine, "--output", mine.repository, "--allow-unfit").status == 0
    other = mine.root / "other"
    assert toolchain("build", mine.engine, "--max-batch-size", 2, "--output", other).status == 0
    assert toolchain("triton", other, "--output", mine.root / "r").status == 1, "the bytes are the same"


def test_the_mark_stays_until_the_gate_is_passed(mine: Made, toolchain: Run) -> None:
    kl = metrics_of(mine)["kl_mean"]
    assert toolchain(*mine.command, "--max-kl", kl / 2).status == 1
    assert toolchain(*mine.command).status == 1, "a run without gates does not forget"
    assert toolchain(*mine.command, "--min-top1", 0).status == 1, "another gate is another gate"
    passed = toolchain(*mine.command, "--max-kl", kl, "--json")
    assert passed.status == 0, passed.err
    assert gates_of(mine)["fit"] is True and mine.repository.is_dir()
    assert {item["gate"]: item["passed"] for item in gates_of(mine)["gates"]} == {
        "max_kl": True,
        "min_top1": True,
    }


def test_the_mark_is_of_the_bytes_that_were_judged(mine: Made, toolchain: Run) -> None:
    assert toolchain(*mine.command, "--max-kl", 0).status == 1
    assert toolchain(*mine.command, "--format", "fp8").status == 0, "other bytes were never judged"
    assert not (mine.engine / "gates.json").exists()


@pytest.mark.parametrize(
    ("gate", "key"),
    [
        ("max_kl", "kl_mean"),
        ("max_ppl_increase", "ppl_increase"),
        ("min_top1", "top1_agreement"),
        ("min_router_agreement", "router_agreement"),
    ],
)
def test_a_spec_sets_gates(mine: Made, toolchain: Run, gate: str, key: str) -> None:
    measured = metrics_of(mine)[key]
    better = measured + 1e-6 if gate.startswith("min") else max(measured, 0.0) / 2
    spec = {"model": str(mine.source), "format": "nvfp4", "calib-data": str(mine.texts), "calib-samples": 8}
    spec |= {"calib-length": 64, "eval-tokens": 256, gate.replace("_", "-"): better}
    path = mine.root / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    where = ("--output", mine.engine, "--triton-output", mine.repository)
    ran = toolchain("engine", path, *where, "--json")
    assert ran.status == (1 if gate != "max_ppl_increase" or measured > 0 else 0), ran.err
    assert gates_of(mine)["gates"][0]["value"] == pytest.approx(measured)


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        (["--max-kl", "-1"], "--max-kl -1.0 (expected at least 0)"),
        (["--max-kl", "nan"], "--max-kl nan (expected at least 0)"),
        (["--min-top1", "98"], "--min-top1 98.0 (expected 0 to 1)"),
    ],
)
def test_limits_that_mean_nothing_are_refused_before_any_work(
    made: Made, toolchain: Run, tmp_path: Path, gates: list[str], words: str
) -> None:
    ran = toolchain("engine", made.source, "--format", "nvfp4", *gates, "--output", tmp_path / "e")
    assert ran.status == 2 and words in ran.err and "Traceback" not in ran.err
    assert not (tmp_path / "e").exists()


def test_gates_without_text_and_router_gates_of_dense_models_are_refused(
    tiny: Callable[[str], Path], made: Made, toolchain: Run, tmp_path: Path
) -> None:
    base = (
        "engine",
        tiny("llama"),
        "--format",
        "fp8",
        "--calib-data",
        made.texts,
        "--output",
        tmp_path / "e",
    )
    ran = toolchain(*base, "--max-kl", "1", "--json")
    assert ran.status == 2 and ran.json["error"]["code"] == "TC-530" and "--eval-data" in ran.out
    ran = toolchain(*base, "--min-router-agreement", "0.9", "--eval-data", made.texts, "--json")
    assert ran.status == 2 and "no routed experts" in ran.out
    assert not (tmp_path / "e").exists()


def test_what_was_not_measured_does_not_pass() -> None:
    judged = judge({"tokens": 5, "kl_mean": math.nan}, Gates(max_kl=1.0, min_top1=0.0))
    assert [item.passed for item in judged] == [False, False]
    with pytest.raises(UsageError):
        Gates(min_top1=1.5)


def test_a_damaged_mark_is_no_pass(mine: Made, toolchain: Run) -> None:
    identity = toolchain(*mine.command, "--max-kl", 100)
    assert identity.status == 0
    value = gates_of(mine)
    value["gates"] = [{"gate": "max_kl"}]
    (mine.engine / "gates.json").write_text(json.dumps(value))
    ran = toolchain("triton", mine.engine, "--output", mine.root / "r", "--json")
    assert ran.status == 1 and ran.json["error"]["code"] == "TC-533"
    assert not (mine.root / "r").exists()


def test_evaluate_judges_gates_and_marks_engines(mine: Made, toolchain: Run) -> None:
    base = ("evaluate", mine.engine, "--baseline", mine.source, "--max-tokens", 256, "--generations", 0)
    failed = toolchain(*base, "--max-kl", 1e-9, "--json")
    assert failed.status == 1 and failed.json["fit"] is False
    assert failed.json["gates"][0]["value"] == failed.json["kl_mean"]
    assert toolchain("triton", mine.engine, "--output", mine.root / "r").status == 1
    passed = toolchain(*base, "--max-kl", 100, "--min-top1", 0)
    assert passed.status == 0, passed.err
    assert toolchain("triton", mine.engine, "--output", mine.root / "r").status == 0
    before = (mine.engine / "gates.json").read_bytes()
    bare = toolchain("evaluate", mine.engine / "checkpoint", *base[2:], "--max-kl", 1e-9)
    assert bare.status == 1 and (mine.engine / "gates.json").read_bytes() == before
    assert not (mine.engine / "checkpoint" / "gates.json").exists()
    alone = toolchain("evaluate", mine.engine, "--data", mine.texts, "--max-kl", 1, "--json")
    assert alone.status == 2 and alone.json["error"]["code"] == "TC-530"
