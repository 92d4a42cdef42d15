"""What a plan says about MoE backends and about reports against a release, for models that exist."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.architectures import Architectures
from toolchain.core.findings import Finding
from toolchain.plan import Serving, make_plan
from toolchain.targets import TRTLLM
from toolchain.targets.known_bad import Case

# (model, request, parallelism) -> (severity, part of the link) that must be there. From the reports themselves.
REPORTED: list[tuple[str, dict[str, str], dict[str, int], tuple[str, str]]] = [
    # Release notes of 1.1.0rc0 and 1.2.0rc3 name these models as new.
    (
        "gpt-oss-120b",
        {"format": "mxfp4", "gpu": "b200", "target_version": "1.0.0"},
        {},
        ("error", "v1.1.0rc0"),
    ),
    (
        "glm-4.5",
        {"format": "fp8", "gpu": "h200", "target_version": "1.1.0"},
        {"tp": 8},
        ("error", "v1.2.0rc3"),
    ),
    # Known issues in the notes of the candidates.
    (
        "deepseek-v3",
        {"format": "nvfp4", "gpu": "b200", "target_version": "1.3.0rc20"},
        {"tp": 8},
        ("warning", "v1.3.0rc20"),
    ),
    (
        "qwen3-30b-a3b",
        {"format": "fp8_block", "gpu": "b200", "target_version": "1.3.0rc29"},
        {},
        ("warning", "v1.3.0rc24"),
    ),
    (
        "gpt-oss-120b",
        {"format": "mxfp4", "gpu": "b200", "target_version": "1.3.0rc29"},
        {"tp": 2},
        ("warning", "v1.3.0rc24"),
    ),
    # Discussion 16360: no MoE backend for expert parallelism on RTX PRO 6000.
    (
        "qwen3-30b-a3b",
        {"format": "nvfp4", "gpu": "rtxpro6000"},
        {"tp": 2, "ep": 2},
        ("warning", "discussions/16360"),
    ),
]
# The same, one step aside: nothing may be said.
SILENT: list[tuple[str, dict[str, str], dict[str, int]]] = [
    ("gpt-oss-120b", {"format": "mxfp4", "gpu": "b200", "target_version": "1.3.0rc29"}, {}),
    ("gpt-oss-120b", {"format": "mxfp4", "gpu": "b200", "target_version": "1.1.0"}, {"tp": 2}),
    ("glm-4.5", {"format": "fp8", "gpu": "h200"}, {"tp": 8}),
    ("qwen3-30b-a3b", {"format": "fp8_block", "gpu": "b200"}, {}),
    ("qwen3-30b-a3b", {"format": "fp8_block", "gpu": "h200", "target_version": "1.3.0rc29"}, {}),
    ("deepseek-v3", {"format": "nvfp4", "gpu": "b200", "target_version": "1.3.0rc22"}, {"tp": 8}),
    ("qwen3-30b-a3b", {"format": "nvfp4", "gpu": "rtxpro6000"}, {"tp": 2}),
    ("llama-3.3-70b", {"format": "fp8", "gpu": "h100", "target_version": "1.0.0"}, {"tp": 4}),
]


def found(architectures: Architectures, model: str, request: dict[str, Any], **serving: Any) -> list[Finding]:
    settings = Serving(max_batch_size=8, max_seq_len=4096, **serving)
    plan = make_plan(architectures.get(model), target="trtllm", serving=settings, **request)
    return [item for item in plan.findings if item.code in ("TC-120", "TC-128", "TC-129")]


@pytest.mark.parametrize(("model", "request_", "serving", "expected"), REPORTED, ids=str)
def test_reports_against_a_release(
    architectures: Architectures,
    model: str,
    request_: dict[str, str],
    serving: dict[str, int],
    expected: tuple[str, str],
) -> None:
    reports = [item for item in found(architectures, model, request_, **serving) if item.code == "TC-128"]
    severity, link = expected
    assert [item for item in reports if item.severity == severity and link in item.message]
    assert all(item.hint.startswith("use ") for item in reports)


@pytest.mark.parametrize(("model", "request_", "serving"), SILENT, ids=str)
def test_nothing_is_said_beside_a_report(
    architectures: Architectures, model: str, request_: dict[str, str], serving: dict[str, int]
) -> None:
    assert [item for item in found(architectures, model, request_, **serving) if item.code != "TC-120"] == []


def test_a_report_about_a_backend_and_a_number_of_experts() -> None:
    """Issue 9021: TRTLLM does not take Qwen3-Coder-480B (160 experts). DEEPGEMM is another backend."""
    case = Case(
        version="1.1.0",
        sm=100,
        parts=(("fp8_block", "moe"),),
        family="qwen3_moe",
        is_moe=True,
        backend="TRTLLM",
        experts=160,
    )

    def reported(**changes: Any) -> bool:
        changed = replace(case, **changes)
        hits = [item.link for item in TRTLLM.known_bad(changed.version) if item.hits(changed)]
        return any(link.endswith("/issues/9021") for link in hits)

    assert reported()
    for other in ({"experts": 128}, {"backend": "DEEPGEMM"}, {"version": "1.2.0"}, {"family": "deepseek"}):
        assert not reported(**other)


def test_a_backend_that_is_asked_for(architectures: Architectures) -> None:
    request = {"format": "nvfp4", "gpu": "b200"}
    assert found(architectures, "qwen3-30b-a3b", request, moe_backend="TRTLLM") == []
    (refused,) = found(architectures, "qwen3-30b-a3b", request, moe_backend="MARLIN")
    assert (refused.code, refused.where) == ("TC-129", "--moe-backend")
    assert "use CUTLASS or CUTEDSL or TRTLLM" in refused.hint


def test_nvfp4_on_h100_is_refused_once_with_what_works(architectures: Architectures) -> None:
    (refused,) = found(architectures, "qwen3-30b-a3b", {"format": "nvfp4", "gpu": "h100"})
    assert refused.code == "TC-120"
    for words in (
        "needs >= 1.3.0rc20 with moe_config.backend MARLIN",
        "W4A16",
        "--format fp8",
        "native on h100",
    ):
        assert words in refused.hint


def test_load_balancing_needs_a_backend_with_it(architectures: Architectures) -> None:
    request = {"format": "nvfp4", "gpu": "h100", "target_version": "1.3.0rc29"}
    (refused,) = found(architectures, "qwen3-30b-a3b", request, tp=2, ep=2, eplb_slots=130)
    assert refused.code == "TC-129"
    assert "without --ep and --eplb-slots there is MARLIN" in refused.hint


def test_the_nearest_gpu_is_named_even_where_it_has_limits(architectures: Architectures) -> None:
    plan = make_plan(architectures.get("gpt-oss-120b"), format="mxfp4", gpu="a100", target="trtllm")
    (refused,) = [item for item in plan.findings if item.code == "TC-120"]
    assert "--gpu h100" in refused.hint and "with limits" in refused.hint


def test_no_hint_names_a_cache_that_another_rule_refuses(architectures: Architectures) -> None:
    """Published MXFP4 has no words for the KV cache."""
    serving = Serving(max_batch_size=64, max_seq_len=131072)
    info = architectures.get("gpt-oss-120b")
    plan = make_plan(info, format="mxfp4", gpu="h100", target="trtllm", serving=serving)
    (short,) = [item for item in plan.findings if item.code == "TC-130"]
    assert "--kv-cache" not in short.hint
    plan = make_plan(
        architectures.get("qwen3-30b-a3b"), format="fp8", gpu="h100", target="trtllm", serving=serving
    )
    (short,) = [item for item in plan.findings if item.code == "TC-130"]
    assert "--kv-cache fp8" in short.hint
