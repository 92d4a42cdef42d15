"""What a plan says of training before anything is loaded: what is trained, what it takes, and what cannot be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.architectures import Architectures
from tests.tiny import make_fp8_source, make_tiny
from toolchain.core.findings import Finding, errors
from toolchain.models.reader import read_model
from toolchain.models.types import ModelInfo
from toolchain.pipeline.planning import make_request_plan
from toolchain.pipeline.request import EngineRequest
from toolchain.plan.planner import make_plan
from toolchain.plan.steps import Training
from toolchain.plan.training import plan_training
from toolchain.plan.types import Plan

GIB = 1024**3


@pytest.fixture(scope="module")
def info(tiny: Callable[[str], Path]) -> ModelInfo:
    return read_model(str(tiny("qwen3_moe")))


def planned(
    info: ModelInfo, format: str = "nvfp4", *, plan: dict[str, Any] | None = None, **changes: Any
) -> Plan:
    """A plan with training that takes little, unless told otherwise."""
    room = {key: changes.pop(key) for key in ("memory_bytes", "on_host", "where") if key in changes}
    training = Training(**{"data": ("text.jsonl",), "length_tokens": 64, **changes})
    return plan_training(make_plan(info, format=format, **(plan or {})), info, training, **room)


def found(plan: Plan, code: str) -> list[Finding]:
    return [item for item in errors(plan.findings) if item.code == code]


def test_trained_is_what_is_quantized_unless_asked(info: ModelInfo) -> None:
    assert planned(info).training.roles == ("routed_expert",)  # type: ignore[union-attr]
    assert planned(info, "fp8").training.roles == ("attention", "routed_expert")  # type: ignore[union-attr]
    asked = planned(info, roles=("router", "routed_expert"))
    assert asked.training.roles == ("router", "routed_expert") and not errors(asked.findings)  # type: ignore[union-attr]


def test_a_plan_with_training_survives_its_file(info: ModelInfo) -> None:
    plan = planned(info, lora_rank=4, held_out=("other.jsonl",))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("format", "recipe", "instead"),
    [
        ("int4_gptq", None, "--format int4_awq"),
        ("int4_awq", "best", "--recipe awq"),
        ("nvfp4", "best", "--recipe max"),
        ("nvfp4", "four_over_six", "--recipe max"),
        ("fp8", "compensate+gptq", "--recipe max"),
        ("w4a8_awq", "awq+clip", "--recipe awq"),
    ],
)
def test_recipes_that_choose_afterwards(
    info: ModelInfo, format: str, recipe: str | None, instead: str
) -> None:
    problems = found(planned(info, format, plan={"recipe": recipe}), "TC-191")
    assert len(problems) == 1 and instead in problems[0].hint


def test_what_a_recipe_chose_is_trained_from_with_learned_scales(info: ModelInfo) -> None:
    chosen = {"recipe": "best"}
    assert not errors(planned(info, "nvfp4", plan=chosen, learned_scales=True).findings)
    (problem,) = found(planned(info, "nvfp4", plan=chosen), "TC-191")
    assert "--learned-scales" in problem.hint
    # Matrices that are not trained would keep no scales of their own.
    assert found(planned(info, "nvfp4", plan=chosen, learned_scales=True, roles=("norm",)), "TC-191")
    assert found(planned(info, "int4_awq", plan=chosen, learned_scales=True), "TC-191")


@pytest.mark.parametrize(
    ("format", "recipe"),
    [
        ("int4_awq", None),
        ("int8_sq", "smoothquant"),
        ("nvfp4", "headroom"),
        ("nvfp4", "pinned"),
        ("mxfp4", None),
    ],
)
def test_recipes_that_can_be_trained(info: ModelInfo, format: str, recipe: str | None) -> None:
    assert not errors(planned(info, format, plan={"recipe": recipe}).findings)


def test_packed_sources(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """FP8 blocks stay what they are as fp8_block; for another format they become BF16 values, which can be trained."""
    info = read_model(str(make_fp8_source(tiny("deepseek_v3"), tmp_path / "fp8")))
    problems = found(planned(info, "fp8_block"), "TC-191")
    assert problems and "BF16 release" in problems[0].hint
    assert not found(planned(info, "nvfp4"), "TC-191")


def test_nothing_is_quantized(info: ModelInfo) -> None:
    layers = info.num_hidden_layers
    from toolchain.plan.policy import PolicyOptions

    plan = planned(info, plan={"policy_options": PolicyOptions(protect_first=layers)})
    assert any("nothing of the model is quantized" in item.message for item in found(plan, "TC-191"))


def test_learned_scales(info: ModelInfo) -> None:
    assert not errors(planned(info, learned_scales=True).findings)
    (problem,) = found(planned(info, "fp8", learned_scales=True), "TC-191")
    assert "nvfp4" in problem.hint


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"method": "kd"}, "--method"),
        ({"batch_size": 0}, "--batch-size"),
        ({"length_tokens": 4096}, "--length"),
        ({"steps": -1}, "--steps"),
        ({"epochs": 0.0}, "--epochs"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"learning_rate": 5.0}, "--learning-rate"),
        ({"held_out_share": 0.9}, "--held-out-share"),
        ({"warmup": 2.0}, "--warmup"),
        ({"precision": "fp8"}, "--precision"),
        ({"devices": 0}, "--devices"),
        ({"parallel": "fsdp2"}, "--parallel"),
        ({"method": "qat", "teacher": "other"}, "--teacher"),
        ({"method": "qat", "temperature": 2.0}, "--temperature"),
        ({"method": "qat", "router_weight": 1.0}, "--router-weight"),
        ({"router_weight": -1.0}, "--router-weight"),
        ({"lora_alpha": 8.0}, "--lora-alpha"),
        ({"lora_rank": 4096}, "--lora-rank"),
        ({"lora_rank": 4, "roles": ("router",)}, "--train"),
        ({"roles": ("shared_expert",)}, "--train"),
        ({"roles": ("expert",)}, "--train"),
    ],
)
def test_values_that_mean_nothing(info: ModelInfo, changes: dict[str, Any], option: str) -> None:
    problems = found(planned(info, **changes), "TC-196")
    assert [item.where for item in problems] == [option] and problems[0].hint


def test_every_problem_at_once(info: ModelInfo) -> None:
    problems = found(planned(info, batch_size=0, epochs=-1.0, precision="int8"), "TC-196")
    assert {item.where for item in problems} == {"--batch-size", "--epochs", "--precision"}


def test_weights_gradients_and_moments(info: ModelInfo) -> None:
    """4 bytes per parameter, and 4 + 8 per trained one; adapters have 16 each."""
    experts = sum(item.parameters for item in info.linears if item.part.role.value == "routed_expert")
    whole = planned(info).estimates.training_memory
    assert whole["weights"] == 4 * info.parameters and whole["teacher"] == info.bytes
    assert whole["gradients"] == 4 * experts and whole["optimizer"] == 8 * experts
    lora = planned(info, lora_rank=4).estimates.training_memory
    adapters = sum(
        4 * (item.in_features + item.out_features)
        for item in info.linears
        if item.part.role.value == "routed_expert"
    )
    assert lora["gradients"] == 4 * adapters and lora["weights"] == 4 * (info.parameters + adapters)
    assert "teacher" not in planned(info, method="qat", patience=0).estimates.training_memory


def test_a_large_model_does_not_fit_one_gpu_and_says_what_does(architectures: Architectures) -> None:
    info = architectures.get("qwen3-30b-a3b")
    room = round(0.9 * 178 * GIB)
    plan = planned(info, length_tokens=2048, precision="bf16", memory_bytes=room, where="--gpu b200")
    (problem,) = found(plan, "TC-190")
    assert "optimizer" in problem.message and "teacher" in problem.message
    assert plan.estimates.training_memory_bytes > 4 * 4 * 30e9 * 0.9
    said = next(part for part in problem.hint.split(" or ") if "--devices" in part)
    devices = int(said.split("--devices ")[1].split()[0])
    checkpointing = "--gradient-checkpointing" in said

    def fits(count: int) -> bool:
        again = planned(
            info, length_tokens=2048, precision="bf16", memory_bytes=room, devices=count, parallel="fsdp2",
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        return not found(again, "TC-190")

    assert fits(devices) and not (devices > 2 and fits(devices - 1)), "the fewest devices that do"


def test_each_way_that_is_named_fits(info: ModelInfo) -> None:
    takes = planned(info, on_host=True, batch_size=16).estimates.training_memory_bytes
    plan = planned(info, on_host=True, batch_size=16, memory_bytes=takes // 3, where="this machine")
    (problem,) = found(plan, "TC-190")
    assert "--batch-size 1 --accumulate 16" in problem.hint and "--devices" not in problem.hint
    less = planned(
        info, on_host=True, batch_size=1, accumulate=16, gradient_checkpointing=True, memory_bytes=takes // 3
    )
    assert not found(less, "TC-190")


def test_room_is_that_of_the_gpu_or_of_this_machine(tiny: Callable[[str], Path]) -> None:
    training = {"data": ["text.jsonl"]}
    on_gpu = make_request_plan(
        EngineRequest(
            model=str(tiny("qwen3_moe")), format="nvfp4", gpu="b200", target="trtllm", training=training
        )
    )
    on_cpu = make_request_plan(
        EngineRequest(model=str(tiny("qwen3_moe")), format="nvfp4", device="cpu", training=training)
    )
    assert on_gpu.training and on_gpu.training.precision == "bf16"
    assert on_cpu.training and on_cpu.training.precision == "fp32"


def test_learning_rate_follows_adapters(tiny: Callable[[str], Path]) -> None:
    def rate(**training: Any) -> float:
        request = EngineRequest(
            model=str(tiny("qwen3_moe")),
            format="nvfp4",
            device="cpu",
            training={"data": "a.jsonl", **training},
        )
        plan = make_request_plan(request)
        assert plan.training is not None
        return plan.training.learning_rate

    assert (rate(), rate(lora=True), rate(lora=True, learning_rate=3e-4)) == (1e-5, 1e-4, 3e-4)


MEASURE = """
import json, sys
from pathlib import Path
import torch, transformers, peft
import modelopt.torch.distill, modelopt.torch.opt, modelopt.torch.quantization
from transformers import Trainer
from toolchain.core.environment import memory_bytes
from toolchain.plan.types import Plan
from toolchain.qat import job, run
torch.set_num_threads(1)
plan, work = Plan.from_json(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

inner, figures = run.run_training, {}

def measured(model, *arguments, **options):
    held = sum(item.nbytes for item in model.parameters())
    teacher = arguments[0]
    held += sum(item.nbytes for item in teacher.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = memory_bytes() - held
    inner(model, *arguments, **options)
    figures["peak"] = peak() - before

run.run_training = measured
job.train(plan, work / "work", work / "trained", device="cpu")
print(json.dumps(figures))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").is_file(), reason="Linux tells the peak of a part of a run"
)
@pytest.mark.parametrize(
    "changes",
    [
        {"length_tokens": 64, "batch_size": 1},
        {"length_tokens": 512, "batch_size": 4},
        {"length_tokens": 64, "batch_size": 1, "lora_rank": 8, "lora_alpha": 16.0},
    ],
)
def test_memory_as_measured(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Within 30 % of the peak of a training on the CPU, of weights as of activations."""
    sizes = dict(hidden_size=512, moe_intermediate_size=512, num_experts=8, num_hidden_layers=6)
    model = make_tiny("qwen3_moe", tmp_path / "model", **sizes)
    text = Path(__file__).parent.parent / "toolchain" / "plan"
    plan = planned(
        read_model(str(model)), data=(str(text),), steps=2, evaluate_every=2, held_out_tokens=512, precision="fp32",
        on_host=True, plan={"calibration": None}, **changes,
    )  # fmt: skip
    from tests.planning import with_calibration

    plan = with_calibration(plan, data=str(text), samples=4, length_tokens=64)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    # Freed memory goes back at once: otherwise allocators keep it, and a peak is of all that was ever held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "plan.json"), str(tmp_path)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])["peak"]
    assert plan.estimates.training_memory_bytes == pytest.approx(measured, rel=0.3)
