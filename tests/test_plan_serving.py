"""Wishes about serving that a plan checks: attention data parallelism, load balancing, prefill, LLM arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Made, Ran
from tests.test_plan_arithmetic import model
from toolchain.models import TensorInfo
from toolchain.plan import Plan, Serving, make_plan
from toolchain.plan.types import KV_FRACTION

SMALL = {"layers": 2, "experts": 8, "hidden": 256, "width": 256, "heads": 4, "kv_heads": 2, "head_dim": 64}


def planned(target: str = "trtllm", **serving: Any) -> Plan:
    wishes = Serving(**{"max_batch_size": 4, "max_seq_len": 1024, **serving})
    return make_plan(model(**SMALL), format="fp8", gpu="h100", target=target, serving=wishes)


def found(plan: Plan, code: str) -> tuple[str, str, str]:
    """(severity, message, hint) of the one finding with this code."""
    (finding,) = [item for item in plan.findings if item.code == code]
    return finding.severity, finding.message, finding.hint


@pytest.mark.parametrize(
    "wish",
    [
        {"attention_dp": True},
        {"eplb_slots": 16},
        {"moe_backend": "CUTLASS"},
        {"llm_args": {"stream_interval": 4}},
    ],
    ids=lambda wish: next(iter(wish)),
)
def test_wishes_for_the_llm_api_mean_nothing_elsewhere(wish: dict[str, Any]) -> None:
    severity, message, hint = found(planned("local", tp=2, ep=2, **wish), "TC-117")
    assert severity == "error"
    assert next(iter(wish)).replace("_", "-") in message and "target local" in message
    assert "--target trtllm" in hint
    assert "TC-117" not in [item.code for item in planned(tp=2, ep=2, **wish).findings]


def test_attention_data_parallelism_over_one_rank_is_pointed_out() -> None:
    severity, message, _ = found(planned(attention_dp=True), "TC-117")
    assert severity == "warning" and "one rank" in message


def test_heads_are_not_divided_under_attention_data_parallelism() -> None:
    """4 heads over 8 ranks do not divide; but with data parallelism each rank has all four."""
    assert "TC-112" in [item.code for item in planned(tp=8, ep=8).findings]
    assert "TC-112" not in [item.code for item in planned(tp=8, ep=8, attention_dp=True).findings]


@pytest.mark.parametrize(
    ("serving", "says", "does"),
    [
        ({"tp": 4, "ep": 4, "eplb_slots": 4}, "4 slots are too few for 8 experts", "--eplb-slots 8"),
        ({"tp": 4, "ep": 4, "eplb_slots": 10}, "10 slots over ep=4 do not divide", "--eplb-slots 12"),
        ({"tp": 4, "ep": 1, "eplb_slots": 12}, "no experts on several ranks", "--ep"),
        ({"tp": 4, "ep": 4, "eplb_layer_updates": 2}, "without slots", "--eplb-slots 12"),
    ],
)
def test_slots_that_cannot_be_divided_are_refused(serving: dict[str, int], says: str, does: str) -> None:
    severity, message, hint = found(planned(**serving), "TC-118")
    assert severity == "error" and says in message and does in hint
    assert "TC-118" not in [item.code for item in planned(tp=4, ep=4, eplb_slots=12).findings]


def test_prompts_that_one_step_cannot_hold_are_pointed_out() -> None:
    severity, message, hint = found(planned(chunked_prefill=False, max_num_tokens=512), "TC-119")
    assert severity == "warning" and "512" in message and "--max-num-tokens 1024" in hint
    assert "TC-119" not in [item.code for item in planned(max_num_tokens=512).findings]


def test_limits_count_from_one() -> None:
    severity, message, _ = found(planned(max_num_tokens=0), "TC-105")
    assert severity == "error" and "--max-num-tokens is 0" in message


def test_activations_shrink_with_the_tokens_of_a_step() -> None:
    large, small = planned(max_batch_size=16), planned(max_batch_size=16, max_num_tokens=1024)
    assert small.estimates.activations_per_gpu_bytes < large.estimates.activations_per_gpu_bytes / 4
    assert "max_num_tokens 1024" in small.estimates.basis


def test_the_share_of_the_kv_cache_is_what_the_arguments_say() -> None:
    def share(**llm_args: Any) -> float:
        return Serving(max_batch_size=1, max_seq_len=1, llm_args=llm_args).kv_fraction

    assert share() == KV_FRACTION
    assert share(kv_cache_config={"free_gpu_memory_fraction": 0.5}) == 0.5
    assert share(kv_cache_config={"dtype": "fp8"}) == KV_FRACTION


def test_towers_are_in_memory_however_many_layers_they_have() -> None:
    """Layers past the decoder's last are multi-token prediction, which is not loaded; those of a tower are."""
    info = model(**SMALL)

    def weights(*names: str) -> int:
        more = tuple(TensorInfo(name=name, shape=(64, 64), dtype="BF16") for name in names)
        plan = make_plan(
            replace(info, tensors=(*info.tensors, *more)), format="fp8", gpu="h100", target="trtllm"
        )
        return plan.estimates.weights_per_gpu_bytes

    assert weights("model.layers.7.eh_proj.weight") == weights()
    assert weights("vision_model.layers.7.mlp.fc1.weight") == weights() + 64 * 64 * 2


def test_a_plan_with_wishes_survives_its_file() -> None:
    plan = planned(
        tp=4,
        ep=4,
        attention_dp=True,
        eplb_slots=12,
        llm_args={"speculative_config": {"decoding_type": "MTP"}},
    )
    again = Plan.from_json(plan.to_json())
    assert again.serving == plan.serving
    assert again.serving.mtp_layers == 1


def test_plans_of_before_have_no_wishes() -> None:
    document = planned().to_json()
    document["serving"] = {"max_batch_size": 4, "max_seq_len": 1024, "tp": 2, "ep": 1, "pp": 1}
    assert Plan.from_json(document).serving == Serving(max_batch_size=4, max_seq_len=1024, tp=2)


def test_an_engine_is_built_with_other_wishes(
    made: Made, toolchain: Callable[..., Ran], tmp_path: Path
) -> None:
    """What is not said again stays as planned before; what is said reaches the arguments of the LLM API."""
    (tmp_path / "more.yaml").write_text("stream_interval: 20\n")
    first, second = tmp_path / "first", tmp_path / "second"
    place = ("--target", "trtllm", "--gpu", "b200", "--trtllm-version", "1.2.1")
    wishes = (
        "--tp",
        2,
        "--ep",
        2,
        "--attention-dp",
        "--max-num-tokens",
        1024,
        "--llm-args",
        tmp_path / "more.yaml",
    )
    ran = toolchain("build", made.engine, *place, *wishes, "--output", first)
    assert ran.status == 0, ran.err
    arguments = yaml.safe_load((first / "llm_args.yaml").read_text())
    assert arguments["enable_attention_dp"] is True
    assert (arguments["max_num_tokens"], arguments["stream_interval"]) == (1024, 20)
    ran = toolchain("build", first, *place, "--no-attention-dp", "--no-chunked-prefill", "--output", second)
    assert ran.status == 0, ran.err
    arguments = yaml.safe_load((second / "llm_args.yaml").read_text())
    assert not arguments.get("enable_attention_dp")
    assert arguments["enable_chunked_prefill"] is False
    assert (arguments["tensor_parallel_size"], arguments["max_num_tokens"]) == (2, 1024)
