"""Mixed precision under a budget: the choice against brute force, budgets against bytes, planted sensitivity."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Ran
from tests.planning import TEXT
from tests.planting import plant_outliers
from toolchain.auto.candidates import Auto
from toolchain.auto.held_out import held_out
from toolchain.auto.knapsack import solve
from toolchain.auto.modelopt import modelopt_scores
from toolchain.auto.outcome import plan_of
from toolchain.auto.search import search
from toolchain.auto.space import Space, find_space
from toolchain.auto.verdict import judge
from toolchain.checkpoint.audit import audit
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Silent
from toolchain.core.roles import Role
from toolchain.evaluate.compare import compare_models
from toolchain.modeling.loading import load_checkpoint, load_source
from toolchain.models.reader import read_model
from toolchain.plan.planner import PlanRefused, make_plan
from toolchain.plan.policy import PolicyOptions
from toolchain.plan.types import Calibration
from toolchain.quantize.job import quantize

CPU = torch.device("cpu")
Tiny = Callable[[str], Path]
CALIBRATION = Calibration(data=str(TEXT), samples=8, length_tokens=64)
TEXTS = ("--calib-data", TEXT, "--calib-samples", 8, "--calib-length", 64)
BITS = 8.4
"""Of a tiny model most parameters are not quantized: NVFP4 everywhere makes 6.18, FP8 everywhere 9.2."""


def space_of(source: Path, bits: float = BITS, **options: Any) -> Space:
    auto = Auto(
        bits=bits,
        formats=options.pop("formats", ("nvfp4", "fp8")),
        method=options.pop("method", "sensitivity"),
    )
    return find_space(read_model(str(source)), auto, calibration=CALIBRATION, **options)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_outliers("qwen3_moe", tmp_path_factory.mktemp("planted") / "model", layer=1)


@pytest.fixture(scope="module")
def found(planted: Path) -> dict[str, Any]:
    """What a search on the planted model finds, as it is read back from a file."""
    return json.loads(json.dumps(search(space_of(planted), device="cpu", tokens=1024)))


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all_within_the_budget(seed: int) -> None:
    chance = random.Random(seed)
    groups = [
        [(chance.randint(1, 40), chance.random()) for _ in range(chance.randint(1, 4))] for _ in range(6)
    ]
    every = [
        (sum(size for size, _ in picks), sum(score for _, score in picks))
        for picks in itertools.product(*groups)
    ]
    for budget in (chance.randint(6, 240) for _ in range(10)):
        fitting = [score for size, score in every if size <= budget]
        solution = solve(groups, budget)
        if not fitting:
            assert solution is None
            continue
        assert solution is not None and solution.exact and solution.size <= budget
        assert solution.score == pytest.approx(min(fitting))
        picked = [group[pick] for group, pick in zip(groups, solution.picks, strict=True)]
        assert sum(size for size, _ in picked) == solution.size


def test_a_thinned_choice_holds_the_budget_and_is_near_the_best() -> None:
    chance = random.Random(0)
    groups = [
        [(size := chance.randint(1000, 2000), chance.random()), (2 * size, chance.random() / 10)]
        for _ in range(60)
    ]
    budget = sum(group[0][0] for group in groups) * 3 // 2
    exact, thinned = solve(groups, budget), solve(groups, budget, states=40)
    assert exact is not None and thinned is not None and not thinned.exact
    assert thinned.size <= budget
    assert thinned.score <= exact.score * 1.05
    assert solve(groups, sum(group[0][0] for group in groups), states=40) is not None


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama"])
def test_bytes_of_any_choice_are_those_of_its_plan(tiny: Tiny, kind: str) -> None:
    formats = ("nvfp4", "fp8") if kind == "gpt_oss" else ("int4_awq", "nvfp4", "fp8")
    space = space_of(tiny(kind), 14.0, formats=formats)
    chance = random.Random(1)
    for _ in range(5):
        chosen = {name: chance.choice(list(sizes)) for name, sizes in space.options.items()}
        plan = space.plan(chosen)
        assert not [item for item in plan.findings if item.severity == "error"]
        total = space.fixed_cost + sum(space.options[name][format] for name, format in chosen.items())
        assert plan.estimates.checkpoint_bytes == total
        assert plan.estimates.effective_bits == space.bits_of(chosen) == space.bits_of_plan(plan)


def test_active_bits_count_experts_by_the_share_that_a_token_uses(tiny: Tiny) -> None:
    """By hand: two of four experts per token, everything else once, per parameter that a token uses."""
    info = read_model(str(tiny("qwen3_moe")))
    space = find_space(
        info, Auto(bits=9.0, formats=("nvfp4", "fp8"), cost="active_moe"), calibration=CALIBRATION
    )
    chosen = space.smallest() | {"0.routed_expert": "fp8"}
    plan = space.plan(chosen)
    sizes = dict.fromkeys(("routed_expert", "rest"), 0)
    for item in plan.assignments:
        sizes["routed_expert" if item.role == "routed_expert" else "rest"] += item.planned_bytes
    active = sizes["routed_expert"] / 2 + sizes["rest"]
    expected = active * 8 / plan.estimates.active_parameters
    assert space.bits_of(chosen) == pytest.approx(expected, rel=1e-12)
    assert space.bits_of_plan(plan) == pytest.approx(expected, rel=1e-12)
    assert space.least_bits > space_of(tiny("qwen3_moe")).least_bits  # what is not quantized weighs more


def test_the_planted_layer_gets_the_wider_format(found: dict[str, Any]) -> None:
    scores = {(item["group"], item["format"]): item["score"] for item in found["scores"]}
    four_bit = {group: score for (group, name), score in scores.items() if name == "nvfp4"}
    assert max(four_bit, key=lambda group: four_bit[group]) == "1.routed_expert"
    assert found["chosen"]["1.routed_expert"] == "fp8"
    assert found["chosen"]["0.routed_expert"] == "nvfp4"
    assert found["verdict"]["kept"] == "mixed"
    measured = found["verdict"]["measured"]
    assert measured["mixed"]["kl"] < measured["nvfp4"]["kl"] / 2
    assert set(measured) == {"mixed", "nvfp4"}  # FP8 everywhere is larger than the budget


def test_what_is_written_holds_the_budget_and_the_measured_kl(
    planted: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    """To the byte, and by the bytes: loaded from disk and compared with the source on the windows of the verdict."""
    space = space_of(planted)
    plan = plan_of(space, found)
    manifest = quantize(plan, tmp_path / "out", device="cpu")
    assert manifest["tensor_bytes"] == plan.estimates.checkpoint_bytes
    assert manifest["tensor_bytes"] * 8 <= BITS * space.info.parameters
    assert manifest["auto"]["verdict"] == found["verdict"]
    verdict = audit(tmp_path / "out", against=planted)
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    judged = held_out(CALIBRATION, planted, data=None, tokens=1024).part(1, 2)
    assert judged.identity == found["held_out"]["verdict"]
    metrics = compare_models(
        load_checkpoint(tmp_path / "out", device=CPU),
        load_source(planted, device=CPU),
        judged.windows.flatten().tolist(),
        window=judged.windows.shape[1],
    )
    assert metrics.kl_mean == pytest.approx(found["verdict"]["measured"]["mixed"]["kl"], rel=1e-9)


def test_with_room_for_everything_each_group_gets_what_harms_it_least(tiny: Tiny) -> None:
    """INT against FP of the same width, too: the lower score wins where both fit."""
    space = space_of(tiny("qwen3_moe"), 15.9, formats=("int4_awq", "nvfp4"), policy="experts-only")
    document = search(space, device="cpu", tokens=256)
    scores = {(item["group"], item["format"]): item["score"] for item in document["scores"]}
    for group, chosen in document["chosen"].items():
        assert set(space.options[group]) == {"int4_awq", "nvfp4"}
        assert scores[group, chosen] == min(scores[group, name] for name in space.options[group])
    assert space.main.name == "int4_awq" and space.plan(document["chosen"]).recipe == "awq"


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_modelopt_ranks_the_planted_group_first_too(planted: Path, method: str) -> None:
    space = space_of(planted, method=method)
    scores = modelopt_scores(space, space.plan(space.smallest()), device="cpu", progress=Silent())
    four_bit = {group: score for (group, name), score in scores.items() if name == "nvfp4"}
    assert set(four_bit) == set(space.options)
    assert max(four_bit, key=lambda group: four_bit[group]) == "1.routed_expert"
    assert scores["1.routed_expert", "fp8"] < four_bit["1.routed_expert"] / 20


def test_hard_rules_and_options_hold(tiny: Tiny) -> None:
    options = PolicyOptions(attention="bf16", shared_experts="fp8", protect_last=1)
    source = tiny("qwen2_moe")
    space = space_of(source, 15.0, policy_options=options)
    assert [group.name for group in space.groups] == ["0.routed_expert"]
    assert set(space.options["0.routed_expert"]) == {"nvfp4", "fp8"}  # never the source dtype
    plan = space.plan(space.smallest())
    by_part = {(item.role, item.layer): item.format for item in plan.assignments}
    assert by_part[Role.ATTENTION, 0] == "source" and by_part[Role.SHARED_EXPERT, 0] == "fp8"
    assert by_part[Role.ROUTED_EXPERT, 1] == by_part[Role.SHARED_EXPERT, 1] == "source"
    everything = space_of(source, 15.0, policy_options=PolicyOptions(lm_head="same"))
    assert {group.role for group in everything.groups} == {
        Role.ROUTED_EXPERT,
        Role.SHARED_EXPERT,
        Role.ATTENTION,
        Role.LM_HEAD,
    }


def test_lead_dense_layers_stay_protected(tiny: Tiny) -> None:
    layers = {group.layer for group in space_of(tiny("deepseek_v3"), 15.0).groups}
    assert layers == {1}


def test_the_smallest_choice_is_the_uniform_format_and_is_called_so(tiny: Tiny) -> None:
    source = tiny("qwen3_moe")
    least = space_of(source).least_bits
    space = space_of(source, least + 1e-6)
    document = search(space, device="cpu", tokens=256)
    assert document["verdict"]["kept"] == "nvfp4" and document["verdict"]["measured"] == {}
    plan = plan_of(space, document)
    alone = make_plan(space.info, format="nvfp4", policy="all-linear", calibration=CALIBRATION)
    assert plan.assignments == alone.assignments
    assert [item.code for item in plan.findings] == ["TC-172"]


def test_a_difference_within_the_noise_keeps_the_uniform_format(planted: Path) -> None:
    """One window judges: nothing is known about noise, so nothing is claimed."""
    space = space_of(planted)
    document = search(space, device="cpu", tokens=64)
    assert document["verdict"]["kept"] == "nvfp4"
    assert "not better beyond noise" in document["verdict"]["reason"]
    plan = plan_of(space, document)
    assert plan.formats == ("nvfp4",)
    assert "not better" in next(item.message for item in plan.findings if item.code == "TC-172")
    assert plan.auto is not None and plan.auto["verdict"]["kept"] == "nvfp4"


@pytest.mark.parametrize(
    ("mixed", "uniform", "kept"),
    [
        ([1.0, 1.1, 0.9, 1.0], [2.0, 2.2, 1.9, 2.1], "mixed"),
        ([1.0, 3.0, 0.5, 2.0], [1.2, 2.0, 1.5, 2.1], "fp8"),
        ([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0], "fp8"),
        ([1.0], [2.0], "fp8"),
    ],
)
def test_a_win_must_exceed_two_standard_errors(mixed: list[float], uniform: list[float], kept: str) -> None:
    figures = {"mixed": torch.tensor(mixed), "fp8": torch.tensor(uniform)}
    assert judge(figures, {"mixed": 5.0, "fp8": 5.0}).kept == kept


def test_a_budget_out_of_reach_is_one_error_with_the_least(tiny: Tiny, toolchain: Callable[..., Ran]) -> None:
    least = space_of(tiny("qwen3_moe")).least_bits
    for command in (("plan",), ("quantize", "--output", "never")):
        name, *rest = command
        made = toolchain(
            name,
            tiny("qwen3_moe"),
            *rest,
            "--format",
            "auto",
            "--bits",
            4,
            "--auto-formats",
            "nvfp4,fp8",
            *TEXTS,
        )
        assert made.status == 2
        assert f"at least {least:.3f} bits" in made.out + made.err
    assert not Path("never").exists()
    with pytest.raises(UsageError, match="cannot be reached"):
        search(space_of(tiny("qwen3_moe"), least - 0.01), device="cpu")
    assert solve([[(5, 1.0)]], 4) is None


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--format", "auto"), "TC-170"),
        (("--format", "nvfp4", "--bits", 5), "TC-170"),
        (("--format", "auto", "--bits", 0), "TC-170"),
        (("--format", "auto", "--bits", "nan"), "TC-170"),
        (("--format", "auto", "--bits", 9, "--auto-formats", "nvfp5"), "TC-101"),
        (("--format", "auto", "--bits", 9, "--auto-formats", "bf16"), "TC-170"),
        (("--format", "auto", "--bits", 9, "--auto-formats", "int4_awq,int4_gptq"), "TC-170"),
        (("--format", "auto", "--bits", 9, "--auto-formats", "nvfp4,int8_sq"), "TC-170"),
        (("--format", "auto", "--bits", 9, "--recipe", "gptqq"), "TC-108"),
        (("--format", "auto", "--bits", 9, "--target", "trtllm", "--gpu", "h100", "--auto-formats", "nvfp4"), "TC-170"),
        (("--format", "auto", "--bits", 9, "--target", "trtllm", "--gpu", "b200", "--auto-formats", "nvfp4,fp8"),
         "TC-170"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_clear_error(
    tiny: Tiny, toolchain: Callable[..., Ran], options: tuple[object, ...], code: str
) -> None:
    made = toolchain("plan", tiny("qwen3_moe"), *options, *TEXTS, "--json")
    assert made.status == 2
    assert made.json["error"]["code"] == code, made.json
    assert made.json["error"]["hint"]


def test_candidates_default_to_what_the_target_runs_and_loads_together(tiny: Tiny) -> None:
    def formats(kind: str, **options: Any) -> tuple[str, ...]:
        return space_of(tiny(kind), 15.0, formats=(), **options).formats

    assert formats("qwen3_moe") == ("nvfp4", "fp8")
    assert formats("llama", target="trtllm", gpu="b200") == ("nvfp4", "fp8")
    # Fused experts beside another format are read by one loader only (targets/trtllm.py).
    assert formats("qwen3_moe", target="trtllm", gpu="b200") == ("nvfp4",)
    assert formats("llama", target="trtllm", gpu="h100") == ("int4_awq", "fp8")
    with pytest.raises(PlanRefused, match="several formats in one"):
        space_of(tiny("qwen3_moe"), 15.0, target="trtllm", gpu="b200")


def test_a_plan_says_what_would_be_searched(tiny: Tiny, toolchain: Callable[..., Ran]) -> None:
    command = (
        "plan",
        tiny("qwen3_moe"),
        "--format",
        "auto",
        "--bits",
        8,
        "--auto-formats",
        "nvfp4, fp8",
        *TEXTS,
    )
    made = toolchain(*command, "--json")
    space = space_of(tiny("qwen3_moe"))
    assert made.status == 0
    assert made.json["auto"]["feasible_bits"] == [space.least_bits, space.most_bits]
    (finding,) = made.json["findings"]
    assert finding["code"] == "TC-173" and "6 layer groups" in finding["message"]


def test_quantize_keeps_its_measurements_and_uses_them_again(
    planted: Path, tmp_path: Path, toolchain: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.pipeline import auto

    searched: list[object] = []
    once = auto.run_search
    monkeypatch.setattr(auto, "run_search", lambda *given: searched.append(given) or once(*given))
    output = tmp_path / "out"
    command = ("quantize", planted, "--output", output, "--format", "auto", "--bits", BITS, *TEXTS)
    made = toolchain(*command, "--device", "cpu", "--json")
    assert made.status == 0, made.err
    record = tmp_path / "out.auto.json"
    document = json.loads(record.read_text())
    assert document["verdict"]["kept"] == "mixed" and made.json["auto"]["bits"] == BITS
    assert made.json["tensor_bytes"] * 8 <= BITS * read_model(str(planted)).parameters
    weights = (output / "model.safetensors").read_bytes()

    # As after a run that was killed while it quantized: the record is there, the checkpoint is not.
    output.rename(tmp_path / "gone")
    again = toolchain(*command, "--device", "cpu")
    assert again.status == 0 and len(searched) == 1
    assert "auto: unchanged" in again.err
    assert (output / "model.safetensors").read_bytes() == weights

    record.write_text("{")
    output.rename(tmp_path / "gone too")
    assert toolchain(*command, "--device", "cpu").status == 0
    assert len(searched) == 2


def test_an_engine_searches_once_and_tells_in_its_manifest(
    planted: Path, tmp_path: Path, toolchain: Callable[..., Ran]
) -> None:
    engine = tmp_path / "engine"
    command = (
        "engine",
        planted,
        "--format",
        "auto",
        "--auto-formats",
        "nvfp4,fp8",
        *TEXTS,
        "--device",
        "cpu",
    )
    where = ("--output", engine, "--triton-output", tmp_path / "repository")
    made = toolchain(*command, "--bits", BITS, *where, "--json")
    assert made.status == 0, made.err
    assert made.json["stages"]["auto"]["facts"]["verdict"]["kept"] == "mixed"
    assert json.loads((engine / "plan.json").read_text())["auto"]["bits"] == BITS
    document = json.loads((engine / "auto.json").read_text())
    assert document["chosen"]["1.routed_expert"] == "fp8"

    again = toolchain(*command, "--bits", BITS, *where)
    assert again.status == 0
    assert "auto: unchanged, skipped" in again.err and "quantize: unchanged, skipped" in again.err
    other = toolchain(*command, "--bits", 9.0, *where)
    assert other.status == 0 and "auto.bits changed from 8.4 to 9.0" in other.err
    plain = toolchain("engine", planted, "--format", "nvfp4", *TEXTS, "--device", "cpu", *where)
    assert plain.status == 0 and not (engine / "auto.json").exists()


def test_a_record_of_another_request_is_refused(planted: Path, found: dict[str, Any]) -> None:
    with pytest.raises(ToolchainError, match="layer groups"):
        plan_of(space_of(planted, policy="experts-only"), found)
    with pytest.raises(ToolchainError, match="does not hold the budget"):
        plan_of(space_of(planted, 7.0), found)


def test_a_spec_asks_for_the_same_as_options(tmp_path: Path) -> None:
    from toolchain.pipeline.request import EngineRequest, read_spec

    (tmp_path / "mixed.yaml").write_text(
        "model: some/model\nformat: auto\nbits: 5\nauto-formats: [nvfp4, fp8]\nauto-method: gradient\n"
    )
    spec = read_spec(tmp_path / "mixed.yaml", {})
    options = EngineRequest(
        model="some/model", format="auto", bits=5.0, auto_formats="nvfp4,fp8", auto_method="gradient"
    )
    assert spec.auto() == options.auto() == Auto(bits=5.0, formats=("nvfp4", "fp8"), method="gradient")
    assert spec.engine_name() == options.engine_name() == "some--model-auto-5-nvfp4-fp8-gradient"
