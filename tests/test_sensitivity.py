"""KL of single layer groups: against checkpoints in which only that group is quantized, and planted sensitivity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Ran
from tests.planning import TEXT, plan_for
from tests.planting import plant_outliers
from toolchain.auto.groups import Group, find_groups, quantized_groups
from toolchain.auto.held_out import HeldOut, held_out
from toolchain.auto.sensitivity import Score, measure
from toolchain.auto.shipped import ship
from toolchain.core.errors import UsageError
from toolchain.core.progress import Silent
from toolchain.core.roles import Role
from toolchain.evaluate.compare import compare_models
from toolchain.evaluate.tokens import begin_token
from toolchain.modeling.loading import load_checkpoint, load_source
from toolchain.models.reader import read_model
from toolchain.plan.types import Plan
from toolchain.quantize.calibration import load_calibration
from toolchain.quantize.job import quantize

CPU = torch.device("cpu")
Tiny = Callable[[str], Path]
TEXTS = ("--calib-data", TEXT, "--calib-samples", 8, "--calib-length", 64, "--eval-tokens", 256)


def windows_for(plan: Plan, tokens: int = 512) -> HeldOut:
    return held_out(plan.calibration, Path(plan.model), data=None, tokens=tokens)


def scores_of(plan: Plan, groups: list[Group], held: HeldOut) -> list[Score]:
    return measure(read_model(plan.model), [plan], groups, held, device="cpu")


@pytest.mark.parametrize(
    ("kind", "format_name", "wanted"),
    [
        ("qwen3_moe", "nvfp4", "1.routed_expert"),
        ("qwen3_moe", "nvfp4", "0.attention.q_proj+k_proj+v_proj"),
        ("deepseek_v3", "fp8", "1.shared_expert.gate_proj+up_proj"),
        ("gpt_oss", "fp8", "0.routed_expert"),
        # AWQ changes the norm before q/k/v too. In layer 0 it sees the same inputs, whatever else is quantized.
        ("mixtral", "int4_awq", "0.attention.q_proj+k_proj+v_proj"),
        ("qwen3_moe", "int8_sq", "0.attention.q_proj+k_proj+v_proj"),
    ],
)
def test_a_group_costs_what_a_checkpoint_costs_in_which_only_it_is_quantized(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str, wanted: str
) -> None:
    """The bytes of such a checkpoint, loaded and compared with the source by ``evaluate``, on the same windows."""
    source = tiny(kind)
    plan = plan_for(source, format_name, policy="all-linear")
    info = read_model(str(source))
    group = next(item for item in quantized_groups(info, plan) if item.name == wanted)
    held = windows_for(plan)
    (score,) = scores_of(plan, [group], held)

    alone = plan_for(
        source, format_name, policy="custom", overrides=[group.override(format_name, source="test")]
    )
    quantize(alone, tmp_path / "out", device="cpu")
    ids = held.windows[:, 1:] if held.identity["bos"] else held.windows
    metrics = compare_models(
        load_checkpoint(tmp_path / "out", device=CPU),
        load_source(source, device=CPU),
        ids.flatten().tolist(),
        window=ids.shape[1],
        bos=int(held.windows[0, 0]) if held.identity["bos"] else None,
    )
    assert metrics.kl_mean > 1e-5
    assert score.kl == pytest.approx(metrics.kl_mean, rel=1e-6)
    saved = alone.estimates.source_bytes - alone.estimates.checkpoint_bytes
    assert score.bits_saved * info.parameters == pytest.approx(8 * saved)


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4_text"]
)
def test_groups_hold_every_quantized_matrix_once_and_what_runtimes_fuse_together(
    tiny: Tiny, kind: str
) -> None:
    plan = plan_for(tiny(kind), "fp8", policy="all-linear")
    info = read_model(str(tiny(kind)))
    groups = quantized_groups(info, plan)
    modules = [name for group in groups for name in group.modules]
    assert len(modules) == len(set(modules))
    assert sum(group.parameters for group in groups) == plan.estimates.quantized_parameters
    experts = [group for group in groups if group.role is Role.ROUTED_EXPERT]
    assert len({group.layer for group in experts}) == len(experts)
    assert all(len(group.linears) == 3 * info.num_experts for group in experts)
    assert not [group for group in groups if {"q_proj"} <= set(group.projections) < {"q_proj", "k_proj"}]


def test_bits_saved_add_up_to_what_the_plan_says(tiny: Tiny) -> None:
    plan = plan_for(tiny("qwen3_moe"), "int4_awq", policy="all-linear")
    info = read_model(str(tiny("qwen3_moe")))
    scores = scores_of(plan, list(quantized_groups(info, plan)), windows_for(plan, 64))
    left = info.bytes * 8 / info.parameters - sum(score.bits_saved for score in scores)
    assert left == pytest.approx(plan.estimates.effective_bits, rel=1e-12)


@pytest.mark.parametrize("kind", ["llama", "minimax", "gpt_oss", "llama4_text"])
def test_every_group_of_every_kind_of_decoder_is_measured(tiny: Tiny, kind: str) -> None:
    plan = plan_for(tiny(kind), "nvfp4", policy="all-linear")
    groups = list(quantized_groups(read_model(str(tiny(kind))), plan))
    scores = scores_of(plan, groups, windows_for(plan, 128))
    assert {score.group for score in scores} == {group.name for group in groups}
    assert all(0 < score.kl < 10 for score in scores)


def test_the_planted_group_comes_first_in_four_bits_and_not_in_eight(tmp_path: Path) -> None:
    source = plant_outliers("qwen3_moe", tmp_path / "model", layer=1)
    info = read_model(str(source))
    plans = [plan_for(source, name, policy="all-linear") for name in ("nvfp4", "fp8")]
    groups = list(quantized_groups(info, plans[0]))
    found = measure(info, plans, groups, windows_for(plans[0]), device="cpu")
    by_format = {
        name: sorted((s for s in found if s.format == name), key=lambda s: -s.kl) for name in ("nvfp4", "fp8")
    }
    assert by_format["nvfp4"][0].group == "1.routed_expert"
    planted = {
        name: next(s for s in rows if s.group == "1.routed_expert") for name, rows in by_format.items()
    }
    assert planted["fp8"].kl < planted["nvfp4"].kl / 20


def test_the_model_is_what_it_was_after_a_group_was_put_in(tiny: Tiny) -> None:
    source = tiny("mixtral")
    plan = plan_for(source, "int4_awq", policy="all-linear")
    group = find_groups(read_model(str(source)), read_model(str(source)).linears)[0]
    shipped = ship(plan, device="cpu", progress=Silent())
    assert shipped.norms
    model: Any = load_source(source, device=CPU)
    tokens = torch.randint(4, 260, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        with shipped.put(model, group):
            inside = model(tokens).logits
        assert torch.equal(model(tokens).logits, before)
    assert not torch.equal(inside, before)


@pytest.mark.parametrize("sampling", ["random", "balanced"])
def test_held_out_windows_are_none_that_calibration_draws_from(tiny: Tiny, sampling: str) -> None:
    from tests.planning import with_calibration

    plan = with_calibration(plan_for(tiny("qwen3_moe"), "nvfp4"), sampling=sampling, length_tokens=64)
    held = held_out(plan.calibration, tiny("qwen3_moe"), data=None, tokens=640)
    used = {tuple(row) for row in load_calibration(plan.calibration, tiny("qwen3_moe")).tokens.tolist()}
    mine = [tuple(row) for row in held.windows[:, int(held.identity["bos"]) :].tolist()]
    assert len(mine) == 10 and not used & set(mine)


def test_bos_stands_before_windows_as_in_evaluate(tiny: Tiny, tmp_path: Path) -> None:
    from toolchain.data.tokenizer import load_tokenizer

    (tmp_path / "text.txt").write_text("some words to judge on " * 40)
    plan = plan_for(tiny("llama"), "fp8")
    held = held_out(plan.calibration, tiny("llama"), data=tmp_path / "text.txt", tokens=256)
    bos = begin_token(load_tokenizer(tiny("llama")))
    assert held.windows.shape == (2, 128 + (bos is not None))
    assert bos is None or set(held.windows[:, 0].tolist()) == {bos}


def test_json_is_sorted_and_names_what_it_depends_on(tiny: Tiny, toolchain: Callable[..., Ran]) -> None:
    command = ("sensitivity", tiny("qwen3_moe"), "--format", "nvfp4", "--formats", "fp8", *TEXTS)
    found = toolchain(*command, "--policy", "experts-only", "--json")
    assert found.status == 0, found.err
    rows = found.json["scores"]
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True)
    assert {(row["group"], row["format"]) for row in rows} == {
        (f"{layer}.routed_expert", name) for layer in (0, 1) for name in ("nvfp4", "fp8")
    }
    assert found.json["held_out"]["windows"] == 4 and found.json["schema_version"] == 1
    assert found.json["recipes"] == {"nvfp4": "max", "fp8": "max"}
    for row in rows:
        assert row["kl_per_bit"] == pytest.approx(row["kl"] / row["bits_saved"])


def test_the_table_has_one_line_per_group(tiny: Tiny, toolchain: Callable[..., Ran]) -> None:
    found = toolchain("sensitivity", tiny("llama"), "--format", "fp8", "--lm-head", "fp8", *TEXTS)
    assert found.status == 0, found.err
    lines = [line for line in found.out.splitlines() if " fp8 " in line and "recipes" not in line]
    assert len(lines) == 2 * 4 + 1
    assert [line for line in lines if line.startswith("lm_head ")]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), "TC-101"),
        (("--format", "nvfp5"), "TC-101"),
        (("--format", "nvfp4", "--formats", "fp8,nvfp5"), "TC-101"),
        (("--format", "nvfp4", "--policy", "everything"), "TC-104"),
        (("--format", "nvfp4", "--recipe", "mine.yaml"), "TC-159"),
        (("--format", "nvfp4", "--eval-tokens", 1), "TC-523"),
        (("--format", "nvfp4", "--data", "absent.jsonl"), "TC-520"),
    ],
)
def test_bad_requests_are_one_clear_error(
    tiny: Tiny, toolchain: Callable[..., Ran], options: tuple[object, ...], code: str
) -> None:
    found = toolchain("sensitivity", tiny("qwen3_moe"), *TEXTS, *options, "--json")
    assert found.status == 2
    assert found.json["error"]["code"] == code
    assert "Traceback" not in found.err


def test_calibration_that_takes_all_text_leaves_none_to_judge_on(tiny: Tiny, tmp_path: Path) -> None:
    from tests.planning import with_calibration

    (tmp_path / "short.txt").write_text("just enough text for two samples " * 4)
    plan = with_calibration(
        plan_for(tiny("llama"), "fp8"), data=str(tmp_path / "short.txt"), length_tokens=64
    )
    with pytest.raises(UsageError, match="no held-out window"):
        held_out(plan.calibration, tiny("llama"), data=None, tokens=256)
