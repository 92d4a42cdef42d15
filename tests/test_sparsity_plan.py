"""What of sparsity is refused, by whom, and what a plan, a request and a build make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.planning import TEXT
from tests.tiny import make_fp8_source, make_tiny
from toolchain.build.tensorrt.command import arguments
from toolchain.core.errors import UsageError
from toolchain.core.findings import Finding, errors
from toolchain.models.reader import read_model
from toolchain.pipeline.request import EngineRequest, read_spec
from toolchain.pipeline.settings import quantize_settings
from toolchain.plan.planner import make_plan
from toolchain.plan.steps import Sparsity
from toolchain.plan.types import Calibration, Plan
from toolchain.quantize.job import quantize

Tiny = Callable[[str], Path]


def plan_of(model: Path, format: str = "fp8", **options: Any) -> Plan:
    options = {"target": "tensorrt", "gpu": "h100", "sparsity": Sparsity(), **options}
    calibration = Calibration(data=str(TEXT), samples=8, length_tokens=128)
    return make_plan(read_model(str(model)), format=format, calibration=calibration, **options)


def said(plan: Plan, code: str) -> list[Finding]:
    return [finding for finding in plan.findings if finding.code == code]


@pytest.mark.parametrize(
    ("kind", "format", "target", "gpu"),
    [
        ("llama", "fp8", "local", "cpu"),
        ("llama", "nvfp4", "local", "cpu"),
        ("llama", "fp8", "trtllm", "h100"),
        ("llama", "fp8", "tensorrt", "l40s"),
        ("llama", "int4_awq", "tensorrt", "h100"),
        ("llama", "nvfp4", "tensorrt", "b200"),
    ],
)
def test_targets_that_gain_nothing_refuse(tiny: Tiny, kind: str, format: str, target: str, gpu: str) -> None:
    found = said(plan_of(tiny(kind), format, target=target, gpu=gpu), "TC-263")
    assert [item.severity for item in found] == ["error"]
    assert "--target tensorrt --format fp8 outside experts on h100" in found[0].hint


def test_experts_gain_nothing_and_are_warned_about(tiny: Tiny) -> None:
    plan = plan_of(tiny("qwen3_moe"))
    assert not errors(plan.findings)
    assert [(item.severity, "experts" in item.message) for item in said(plan, "TC-263")] == [
        ("warning", True)
    ]
    alone = plan_of(tiny("qwen3_moe"), policy="experts-only")
    assert [item.severity for item in said(alone, "TC-263")] == ["error"]


def test_gains_that_nobody_reported_are_warned_about(tiny: Tiny) -> None:
    found = said(plan_of(tiny("llama"), gpu="b200"), "TC-263")
    assert [item.severity for item in found] == ["warning"] and "unverified" in found[0].message
    assert not said(plan_of(tiny("llama")), "TC-263")


def test_a_recipe_that_solves_weights_again_is_refused(tiny: Tiny) -> None:
    (found,) = said(plan_of(tiny("llama"), recipe="compensate+gptq"), "TC-265")
    assert found.severity == "error" and "compensate" in found.message
    assert not said(plan_of(tiny("llama"), recipe="gptq"), "TC-265")


def test_sizes_that_modelopt_passes_over_are_refused(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", intermediate_size=264)
    messages = [item.message for item in said(plan_of(model), "TC-265")]
    assert len(messages) == 1 and "128 x 264" in messages[0] and "8 x 16" in messages[0]
    assert not said(plan_of(model, sparsity=Sparsity(method="sparsegpt")), "TC-265")


def test_numbers_that_are_copied_cannot_become_zero(tiny: Tiny, tmp_path: Path) -> None:
    source = make_fp8_source(tiny("llama"), tmp_path / "source")
    (found,) = said(plan_of(source, "fp8_block"), "TC-265")
    assert "as they are" in found.message


def test_nothing_is_smaller_for_it(tiny: Tiny) -> None:
    dense, thin = plan_of(tiny("llama"), sparsity=None), plan_of(tiny("llama"))
    assert thin.estimates.checkpoint_bytes == dense.estimates.checkpoint_bytes
    assert thin.estimates.effective_bits == dense.estimates.effective_bits
    assert thin.estimates.weights_per_gpu_bytes == dense.estimates.weights_per_gpu_bytes
    assert "zeros are stored" in thin.estimates.basis


def test_sparsegpt_is_planned_in_memory_only(tiny: Tiny, tmp_path: Path) -> None:
    plan = plan_of(tiny("llama"), sparsity=Sparsity(method="sparsegpt"))
    dense = plan_of(tiny("llama"), sparsity=None)
    # One layer: q, k, v and o on 128 inputs, gate and up on 128, down on 256; float32.
    assert plan.estimates.quantize_memory_bytes - dense.estimates.quantize_memory_bytes == 4 * (
        6 * 128**2 + 256**2
    )
    assert plan.estimates.stream_way == ""
    with pytest.raises(UsageError, match="in memory") as error:
        quantize(plan, tmp_path / "out", stream=True)
    assert error.value.code == "TC-265" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": "1:2"},
        {"sparsity": "4:8"},
        {"sparsity": "2:4", "sparsity_method": "random"},
        {"sparsity_method": "sparsegpt"},
        {"sparsity": "2:4", "format": "auto", "bits": 5.0},
    ],
)
def test_bad_values_are_one_clear_error(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        EngineRequest(**{"model": "m", "format": "fp8", **options})
    assert error.value.code == "TC-265" and error.value.hint


def test_the_command_line_refuses_and_says_where_to_go(toolchain: Any, tiny: Tiny) -> None:
    refused = toolchain("plan", tiny("llama"), "--format", "fp8", "--sparsity", "2:4", "--json")
    assert refused.status == 2
    assert [item["code"] for item in refused.json["findings"] if item["severity"] == "error"] == ["TC-263"]
    bad = toolchain("plan", tiny("llama"), "--format", "fp8", "--sparsity", "50%")
    assert bad.status == 2 and "TC-265" in bad.err and "2:4" in bad.err
    words = ("--format", "fp8", "--target", "tensorrt", "--gpu", "h100", "--sparsity", "2:4")
    planned = toolchain("plan", tiny("llama"), *words)
    assert planned.status == 0 and "2:4 by magnitude" in planned.out


def test_specs_names_and_settings_know_it(tiny: Tiny, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        'model: m\nformat: fp8\nsparsity: "2:4"\nsparsity-method: sparsegpt\ntarget: tensorrt\ngpu: h100\n'
    )
    request = read_spec(spec, {})
    assert request.sparsity_options() == Sparsity(method="sparsegpt")
    assert request.engine_name() == "m-fp8-2-4-sparsegpt-tensorrt-h100"
    plan = plan_of(tiny("llama"))
    assert Plan.from_json(plan.to_json()).sparsity == Sparsity()
    thin, dense = (
        quantize_settings(item, device="cpu", model_files={}, calibration_hash=None)
        for item in (plan, replace(plan, sparsity=None))
    )
    assert set(thin) - set(dense) == {"sparsity.pattern", "sparsity.method"}


def test_trtllm_build_is_told(tiny: Tiny, tmp_path: Path) -> None:
    assert "--weight_sparsity" in arguments(plan_of(tiny("llama")), tmp_path)
    assert "--weight_sparsity" not in arguments(plan_of(tiny("llama"), sparsity=None), tmp_path)
    # Its matmul plugin would compute with dense kernels.
    words = arguments(plan_of(tiny("llama")), tmp_path)
    assert words[words.index("--gemm_plugin") + 1] == "disable"
