"""Which samples a mixture of experts is calibrated on, from which text, and which wishes are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import TEXT, plan_for, with_calibration
from toolchain.core.progress import Silent
from toolchain.models.reader import read_model
from toolchain.plan.planner import PlanRefused, make_plan, require_clean
from toolchain.plan.types import Calibration, Plan
from toolchain.quantize.calibration import load_calibration
from toolchain.quantize.job import calibrate, quantize
from toolchain.quantize.sampling import choose_balanced, shortest_prefix

Tiny = Callable[[str], Path]
SMALL = Calibration(data=str(TEXT), samples=8, length_tokens=64)


def test_samples_are_drawn_until_every_expert_has_enough(tiny: Tiny) -> None:
    """As few as needed, counted again by hand from the coverage of the samples that were chosen."""
    source = tiny("qwen3_moe")
    plan = with_calibration(
        plan_for(source, "nvfp4"), samples=2, length_tokens=32, min_tokens_per_expert=60, max_samples=64
    )
    done = calibrate(plan, device="cpu")
    assert done.coverage is not None
    count = done.manifest["calibration"]["samples"]
    assert 2 < count < 64 and done.coverage["min"] >= 60 and not done.manifest["starved_experts"]
    fewer = with_calibration(plan, samples=count - 1, min_tokens_per_expert=0)
    short = calibrate(fewer, device="cpu")
    assert short.coverage is not None and short.coverage["min"] < 60
    assert done.manifest["calibration"]["pool"]["samples"] > count


@pytest.mark.parametrize("sampling", ["random", "balanced"])
@pytest.mark.parametrize("format_name", ["nvfp4", "int4_awq"])
def test_the_same_seed_gives_the_same_bytes_however_samples_are_chosen(
    tiny: Tiny, tmp_path: Path, sampling: str, format_name: str
) -> None:
    plan = with_calibration(
        plan_for(tiny("mixtral"), format_name),
        samples=4, length_tokens=32, sampling=sampling, min_tokens_per_expert=70, max_samples=32,
    )  # fmt: skip
    first = quantize(plan, tmp_path / "a", device="cpu")
    second = quantize(plan, tmp_path / "b", device="cpu")
    assert first["files"] == second["files"] and first["calibration"] == second["calibration"]
    assert first["calibration"]["chosen_sha256"]
    other = calibrate(with_calibration(plan, seed=1), device="cpu")
    assert other.manifest["calibration"]["tokens_sha256"] != first["calibration"]["tokens_sha256"]


def test_balanced_sampling_fills_the_least_used_expert(tiny: Tiny) -> None:
    """Text of two kinds: a rare one uses experts that the common one leaves alone, by construction of the counts."""
    common, rare = torch.tensor([[30, 34, 0, 0]]), torch.tensor([[20, 20, 12, 12]])
    counts = torch.cat([common.repeat(20, 1), rare.repeat(3, 1)])
    chosen = choose_balanced(counts, samples=4)
    assert {20, 21, 22} < set(chosen) and len(chosen) == 4
    assert choose_balanced(counts, samples=4) == chosen == sorted(chosen)
    # The first two experts reach 90; nothing is left that helps the others, so no more is drawn.
    assert choose_balanced(counts[:21], samples=1, minimum=90, limit=10) == [0, 1, 2, 20]
    assert choose_balanced(counts, samples=1, minimum=24, limit=10) == [20, 21]


def test_greedy_choice_is_the_greedy_choice() -> None:
    """The heap against the definition: scan everything in each step."""
    counts = torch.randint(0, 9, (40, 12), generator=torch.Generator().manual_seed(0))
    total, chosen = torch.zeros(12, dtype=torch.float64), []
    for _ in range(15):
        gains = (torch.log1p(total + counts.double()) - torch.log1p(total)).sum(1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        total += counts[chosen[-1]]
    assert choose_balanced(counts, samples=15) == sorted(chosen)


def test_shortest_prefix() -> None:
    counts = torch.tensor([[3, 1], [3, 0], [0, 2], [5, 5]])
    assert shortest_prefix(counts, 1, 3) == 3
    assert shortest_prefix(counts, 4, 3) == 4
    assert shortest_prefix(counts, 1, 0) == 1
    assert shortest_prefix(counts, 1, 100) == 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"mode": "topk", "topk_ratio": 0.0}, r"not in \(0, 1\]"),
    ({"mode": "topk", "topk_ratio": 1.5}, r"not in \(0, 1\]"),
    ({"mode": "topk", "topk_ratio": float("nan")}, r"not in \(0, 1\]"),
    ({"mode": "some"}, "unknown 'some'"),
    ({"sampling": "even"}, "unknown 'even'"),
    ({"mode": "all", "topk_ratio": 0.5}, "has no meaning"),
    ({"min_tokens_per_expert": -1}, "negative"),
    ({"min_tokens_per_expert": 1, "samples": 64, "max_samples": 32}, "less than the 64"),
    (
        {"min_tokens_per_expert": 65, "max_samples": 2, "samples": 2},
        "cannot be reached.*--calib-max-samples 3",
    ),
]


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_settings_that_mean_nothing_are_refused_by_the_plan(
    tiny: Tiny, changes: dict[str, Any], said: str
) -> None:
    """The last case: 65 tokens for each of 4 experts, 2 samples of 64 tokens with 2 experts each make 256 choices."""
    plan = make_plan(
        read_model(str(tiny("qwen3_moe"))), format="nvfp4", calibration=replace(SMALL, **changes)
    )
    with pytest.raises(PlanRefused):
        require_clean(plan)
    import re

    assert any(finding.code == "TC-160" and re.search(said, str(finding)) for finding in plan.findings)


def test_expert_options_on_a_dense_model_are_a_warning_and_change_nothing(tiny: Tiny) -> None:
    wanted = replace(SMALL, min_tokens_per_expert=5, sampling="balanced")
    plan = require_clean(make_plan(read_model(str(tiny("llama"))), format="fp8", calibration=wanted))
    assert [finding.code for finding in plan.findings if finding.code == "TC-161"]
    plain = calibrate(with_calibration(plan, min_tokens_per_expert=0, sampling="random"), device="cpu")
    asked = calibrate(plan, device="cpu")
    hashes = [done.manifest["calibration"]["tokens_sha256"] for done in (plain, asked)]
    assert hashes[0] == hashes[1] and asked.manifest["coverage"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--calibrate-topk-ratio", "0.5"], "give both"),
        (["--calibrate-experts", "topk"], "give both"),
        (["--calibrate-experts", "topk", "--calibrate-topk-ratio", "2"], "not in (0, 1]"),
        (["--min-tokens-per-expert", "-1"], "at least 0"),
        (["--min-tokens-per-expert", "999999999"], "cannot be reached"),
    ],
)
def test_the_command_line_refuses_contradictions(
    toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path, options: list[str], said: str
) -> None:
    given = ("quantize", tiny("qwen3_moe"), "--format", "nvfp4", "--calib-data", TEXT)
    ran = toolchain(*given, "--output", tmp_path / "out", *options)
    assert ran.status == 2 and said in ran.err and not (tmp_path / "out").exists()


def test_options_reach_the_plan_and_plans_survive_json(
    toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("a" * 500)
    ran = toolchain(
        "quantize", tiny("qwen3_moe"), "--format", "nvfp4", "--calib-data", TEXT, "--calib-data", tmp_path / "one.txt",
        "--calibrate-experts", "topk", "--calibrate-topk-ratio", 0.5, "--min-tokens-per-expert", 7, "--strict",
        "--calib-max-samples", 200, "--sampling", "balanced", "--allow-tf32", "--output", tmp_path / "out",
        "--dry-run", "--json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    plan = Plan.from_json(ran.json)
    found = plan.calibration
    assert found.sources == (str(TEXT), str(tmp_path / "one.txt"))
    assert (found.mode, found.topk_ratio, found.min_tokens_per_expert) == ("topk", 0.5, 7)
    assert (found.max_samples, found.sampling, found.strict, found.allow_tf32) == (
        200,
        "balanced",
        True,
        True,
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_several_sources_are_drawn_from_evenly_and_copies_are_dropped(tiny: Tiny, tmp_path: Path) -> None:
    """One byte is one token. The second file repeats a document of the first and is otherwise short of text."""
    documents = ["a" * 200, "b" * 200, "b" * 200 + "\n"]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (tmp_path / "short.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ["a" * 200, "z" * 100])
    )
    sources = (str(tmp_path / "long.jsonl"), str(tmp_path / "short.jsonl"))
    settings = Calibration(data=sources, samples=8, length_tokens=32)
    found = load_calibration(settings, tiny("llama"))
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    load_calibration(settings, tiny("llama"), Notes())
    assert any("dropped 2 of 5" in note for note in notes)
    from transformers import AutoTokenizer

    rows = AutoTokenizer.from_pretrained(tiny("llama")).batch_decode(found.tokens)
    from_second = ["z" in row for row in rows]
    assert from_second == [False, True, False, True, False, True, False, False]
    assert found.identity["source"] == list(sources) and found.identity["duplicates_dropped"] == 2


def test_evaluation_says_when_it_judges_on_calibration_text(
    toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    lines = [f"def f{i}(x):\n    return x * {i * 7919 % 1009} + {i % 7}  # {i:b}\n" for i in range(400)]
    (tmp_path / "a.txt").write_text("".join(lines[:200]))
    (tmp_path / "b.txt").write_text("".join(lines[200:]))
    data = ("--calib-data", tmp_path / "a.txt", "--calib-samples", 32, "--calib-length", 128)
    made = toolchain("quantize", tiny("qwen3_moe"), "--format", "fp8", *data, "--output", tmp_path / "out")
    assert made.status == 0, made.err
    overlaps = {}
    for name in ("a", "b"):
        given = (
            "evaluate",
            tmp_path / "out",
            "--data",
            tmp_path / f"{name}.txt",
            "--max-tokens",
            2048,
            "--json",
        )
        ran = toolchain(*given)
        assert ran.status == 0, ran.err
        overlaps[name] = ran.json["data"]["calibration_overlap"]
        assert ("TC-525" in ran.err) == (name == "a")
    # Half of the text was calibrated on: 32 x 128 of its bytes.
    share = 32 * 128 / len("".join(lines[:200]))
    assert abs(overlaps["a"] - min(1.0, share)) < 0.25 and overlaps["b"] < 0.05


def test_settings_of_several_sources_equal_those_read_back_from_a_record(tiny: Tiny) -> None:
    """Else a finished stage would run again each time."""
    from toolchain.pipeline.settings import plan_settings, quantize_settings

    plan = with_calibration(plan_for(tiny("mixtral"), "fp8"), data=(str(TEXT), "some/data-set"))
    for settings in (
        plan_settings(plan),
        quantize_settings(plan, device="cpu", model_files={}, calibration_hash=None),
    ):
        assert json.loads(json.dumps(settings)) == settings
