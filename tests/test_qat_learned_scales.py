"""Learned block scales: the start is PTQ, gradients are LSQ's, and what is packed is what the student computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.planning import plan_for
from tests.training import training_plan
from toolchain.checkpoint.audit import audit
from toolchain.codecs import e2m1, get_codec
from toolchain.core.errors import ToolchainError
from toolchain.formats import FORMATS
from toolchain.modeling.loading import load_checkpoint
from toolchain.plan.steps import Training
from toolchain.qat.export import export_trained
from toolchain.qat.job import train as run_training
from toolchain.qat.learned_scales import (
    enable_learned_scales,
    learned_state,
    packed_with_learned,
    restore_learned,
)
from toolchain.qat.lora import add_lora, merge_lora
from toolchain.qat.student import Student, load_start, make_student, save_start
from toolchain.qat.trained import write_trained
from toolchain.quantize.job import quantize
from toolchain.quantize.quantizers import fused_groups

Tiny = Callable[[str], Path]
NVFP4 = ("nvfp4", "w4a16_nvfp4", "w4a8_nvfp4_fp8")
CASES = [
    ("qwen3_moe", "nvfp4"),
    ("qwen3_moe", "w4a16_nvfp4"),
    ("llama", "nvfp4"),
    ("llama", "w4a8_nvfp4_fp8"),
]


def make(source: Path, format_name: str, **training: Any) -> Student:
    plan = plan_for(source, format_name, policy="all-linear")
    plan = replace(plan, training=Training(data=("x",), learned_scales=True, **training))
    return make_student(plan, device="cpu")


def computed(student: Student) -> dict[str, torch.Tensor]:
    """Module path -> the weight values that its forward pass multiplies with."""
    with torch.no_grad():
        found = {path: student.model.get_submodule(path) for path in student.modules}
        return {path: linear.weight_quantizer(linear.weight) for path, linear in found.items()}


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(4, 260, (rows, 64), generator=torch.Generator().manual_seed(0))


def train(student: Student, parameters: list[torch.nn.Parameter], steps: int = 4, rate: float = 4e-3) -> None:
    """A few steps towards other logits, far enough that scales and codes change."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    goal = torch.randn(2, 64, 320, generator=torch.Generator().manual_seed(1)) * 4
    for _ in range(steps):
        (student.model(tokens()).logits - goal).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_weights(student: Student) -> list[torch.nn.Parameter]:
    found = [student.model.get_submodule(path).weight for path in student.modules]
    return [weight.requires_grad_() for weight in found]


@pytest.mark.parametrize(("kind", "format_name"), CASES)
def test_it_begins_at_the_best_scales_and_packs_what_it_computes(
    tiny: Tiny, kind: str, format_name: str
) -> None:
    student = make(tiny(kind), format_name)
    if kind == "llama":  # blocks and whole matrices of zeros
        student.model.get_submodule("model.layers.0.mlp.down_proj").weight.data[:, :32] = 0
        student.model.get_submodule("model.layers.0.mlp.up_proj").weight.data.zero_()
    plain = computed(student)
    scales = enable_learned_scales(student)
    assert len(scales) == len(student.modules)
    start = computed(student)
    for path in list(student.modules)[:5]:
        weight = student.model.get_submodule(path).weight.data
        least, group = least_errors(student, path), get_codec(format_name).format.group_size
        found = (start[path] - weight).unflatten(-1, (-1, group)).square().sum(-1)
        torch.testing.assert_close(found, least, rtol=1e-3, atol=1e-9)
        assert float(found.sum()) <= float((plain[path] - weight).square().sum())

    train(student, [*trained_weights(student), *scales.values()])
    after, packed = computed(student), packed_with_learned(student)
    assert set(packed) == set(student.modules)
    changed = 0
    for path, tensors in packed.items():
        codec = get_codec(format_name)
        assert {item.suffix for item in codec.format.stored} == set(tensors)
        assert tensors["weight_scale"].dtype == torch.float8_e4m3fn
        assert torch.equal(codec.unpack(tensors, torch.float32), after[path])
        plain = codec.pack(student.model.get_submodule(path).weight.data, _calibrated(student, path))
        changed += int((plain["weight_scale"].float() != tensors["weight_scale"].float()).sum())
        for suffix in tensors.keys() & {"weight_scale_2", "input_scale"}:
            assert torch.equal(tensors[suffix], plain[suffix])
    assert changed > 100  # scales were learned: no longer those of the weights
    for group in fused_groups(student.modules, student.family):
        for suffix in ("weight_scale_2", "input_scale"):
            assert len({float(packed[path][suffix]) for path in group if suffix in packed[path]}) <= 1


def least_errors(student: Student, path: str) -> torch.Tensor:
    """[out, in / block]: the least squared error of each block over all E4M3 scales, by trying every one."""
    linear, codec = student.model.get_submodule(path), get_codec(student.modules[path])
    group, known, best = codec.format.group_size, _calibrated(student, path), None
    for code in range(1, 127):
        code_of_all = torch.full(
            (len(linear.weight), linear.weight.shape[1] // group), code, dtype=torch.uint8
        )
        tried = replace(known, weight_scale=code_of_all.view(torch.float8_e4m3fn))
        values = codec.unpack(codec.pack(linear.weight.data, tried), torch.float32)
        error = (values - linear.weight.data).unflatten(-1, (-1, group)).square().sum(-1)
        best = error if best is None else torch.minimum(best, error)
    assert best is not None
    return best


def _calibrated(student: Student, path: str) -> Any:
    """What plain packing knows of the matrix."""
    from toolchain.codecs.base import Calibrated

    linear = student.model.get_submodule(path)
    inputs = linear.input_quantizer
    return Calibrated(
        weight_amax=linear.weight_quantizer.amax, input_amax=inputs.amax if inputs.is_enabled else None
    )


def test_gradients_are_those_of_the_definition(tiny: Tiny) -> None:
    """w_q = round(w / s) * s', s' = E4M3(amax / 6) straight through: by hand, of one matrix."""
    student = make(tiny("llama"), "nvfp4")
    path = "model.layers.0.self_attn.o_proj"
    linear = student.model.get_submodule(path)
    # bf16 numbers often lie in the middle of two codes.
    noise = torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(0))
    linear.weight.data.mul_(1 + 1e-4 * noise)
    (amax,) = enable_learned_scales(student, [path]).values()
    weight = linear.weight.requires_grad_()
    outer = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (linear.weight_quantizer(weight) * outer).sum().backward()

    scale_2 = linear.weight_quantizer.amax / (6 * 448)
    blocks = weight.detach().unflatten(-1, (-1, 16))
    scale = (amax.detach() / (6 * scale_2)).to(torch.float8_e4m3fn).float() * scale_2
    ratio = blocks / scale[..., None]
    values = torch.tensor([*e2m1.VALUES, *(-v for v in e2m1.VALUES)])
    rounded = values[(ratio[..., None] - values).abs().argmin(-1)]
    expected = (outer.unflatten(-1, (-1, 16)) * rounded).sum(-1) / 6
    assert (amax.grad is not None) and torch.allclose(amax.grad, expected, rtol=1e-4, atol=1e-4)
    inside = (ratio.abs() <= 6).flatten(-2)
    assert weight.grad is not None and torch.allclose(weight.grad, outer * inside, rtol=1e-5, atol=1e-6)
    assert 0 < int((~inside).sum()) < 0.1 * inside.numel()  # a scale that was rounded down clips its largest


def test_the_arithmetic_is_modelopts_own(tiny: Tiny) -> None:
    """ModelOpt's scale path runs on CPUs; it multiplies by reciprocals, so its last digit may be another."""
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import StaticBlockScaleQuantizer

    student = make(tiny("llama"), "nvfp4")
    path = "model.layers.1.mlp.down_proj"
    (amax,) = enable_learned_scales(student, [path]).values()
    quantizer = student.model.get_submodule(path).weight_quantizer
    theirs = StaticBlockScaleQuantizer._block_scale_from_amax(quantizer, amax, True)
    # Weights of one time their scale are stored as code 1.0: what stands for them is the scale.
    ones = theirs.detach().reshape(amax.shape).repeat_interleave(16, -1)
    ours = quantizer(ones)[..., ::16]
    assert torch.allclose(ours, theirs.reshape(ours.shape), rtol=1e-6)
    ours.sum().backward()
    mine, amax.grad = amax.grad, None
    theirs.sum().backward()
    inside = amax < quantizer.amax * (1 - 1e-6)  # at the end of E4M3's range ModelOpt's gradient is 0
    assert amax.grad is not None and torch.allclose(mine[inside], amax.grad[inside])


def test_state_restores_on_a_fresh_student(tiny: Tiny, tmp_path: Path) -> None:
    student = make(tiny("qwen3_moe"), "nvfp4")
    train(student, list(enable_learned_scales(student).values()), steps=2)
    save_file(learned_state(student), tmp_path / "scales.safetensors")
    state = load_file(tmp_path / "scales.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}

    fresh = make(tiny("qwen3_moe"), "nvfp4")
    found = restore_learned(fresh, state)
    assert len(found) == len(student.modules) and all(p.requires_grad for p in found.values())
    with torch.no_grad():
        assert torch.equal(fresh.model(tokens()).logits, student.model(tokens()).logits)

    key = next(iter(state))
    for broken in ({**state, key: state[key][:1]}, {f"nowhere.{key}": state[key]}, {key: state[key]}):
        with pytest.raises(ToolchainError) as raised:
            restore_learned(fresh, broken)
        assert raised.value.code == "TC-261"


@pytest.mark.parametrize(("kind", "format_name", "rank"), [("qwen3_moe", "nvfp4", 0), ("llama", "nvfp4", 4)])
def test_the_checkpoint_computes_what_the_student_computes(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str, rank: int
) -> None:
    """Weights and learned scales go through files; with adapters, too."""
    student = make(tiny(kind), format_name, lora_rank=rank, lora_alpha=8.0)
    weights = list(add_lora(student).values()) if rank else trained_weights(student)
    scales = enable_learned_scales(student)
    assert {id(p) for p in scales.values()} <= {id(p) for p in student.model.parameters() if p.requires_grad}
    train(student, [*weights, *scales.values()], steps=2)
    if rank:
        merge_lora(student)
    write_trained(student, tmp_path / "trained", {})
    export_trained(student.plan, tmp_path / "trained", tmp_path / "out", device="cpu")
    verdict = audit(tmp_path / "out", against=tmp_path / "trained")
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    ours = load_checkpoint(tmp_path / "out", device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(tokens()).logits, student.model.eval()(tokens()).logits)


@pytest.mark.parametrize(
    ("kind", "format_name", "recipe"),
    [("qwen3_moe", "nvfp4", "compensate+local_hessian+gptq"), ("llama", "w4a16_nvfp4", "mse+gptq")],
)
def test_training_goes_on_from_what_a_recipe_chose(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str, recipe: str
) -> None:
    """The student computes what the recipe's checkpoint does, before and after it is saved, and exports its values."""
    source = tiny(kind)
    plan = plan_for(source, format_name, policy="all-linear", recipe=recipe)
    quantize(plan, tmp_path / "ptq", device="cpu")
    plan = replace(plan, training=Training(data=("x",), learned_scales=True))
    expected = load_checkpoint(tmp_path / "ptq", device=torch.device("cpu"), dtype=torch.float32)
    student = make_student(plan, device="cpu")
    save_start(student, tmp_path / "start")
    for started in (student, load_start(plan, tmp_path / "start", device="cpu")):
        assert started.chosen == set(started.modules)
        enable_learned_scales(started)
        with torch.no_grad():
            assert torch.equal(started.model.eval()(tokens()).logits, expected(tokens()).logits)
    write_trained(student, tmp_path / "trained", {})
    export_trained(plan, tmp_path / "trained", tmp_path / "out", device="cpu")
    out = load_checkpoint(tmp_path / "out", device=torch.device("cpu"), dtype=torch.float32)
    for (name, ours), theirs in zip(out.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("format_name", "training"),
    [
        ("nvfp4", {}),
        ("int4_awq", {"learned_scales": True}),
        ("nvfp4", {"learned_scales": True, "roles": ("norm",)}),
    ],
)
def test_what_a_recipe_chose_must_be_trained_whole(
    tiny: Tiny, format_name: str, training: dict[str, Any]
) -> None:
    plan = plan_for(tiny("llama"), format_name, policy="all-linear", recipe="gptq")
    with pytest.raises(ToolchainError) as error:
        make_student(replace(plan, training=Training(data=("x",), **training)), device="cpu")
    assert error.value.code == "TC-250" and "--learned-scales" in error.value.hint


@pytest.mark.parametrize(("rate", "improved"), [(3e-4, True), (0.3, False)])
def test_a_training_learns_them_or_keeps_the_start(
    tiny: Tiny, tmp_path: Path, rate: float, improved: bool
) -> None:
    source = tiny("qwen3_moe")
    plan = training_plan(source, learned_scales=True, learning_rate=rate, steps=6, weight_decay=0.1)
    record = run_training(plan, tmp_path / "work", tmp_path / "trained", device="cpu")
    assert record["improved"] == improved
    groups = json.loads((tmp_path / "work" / "checkpoints" / "checkpoint-6" / "optimizer.json").read_text())
    for group in groups:
        learns_scales = {"_quantizer." in name for name in group["params"]}
        assert learns_scales == {group["weight_decay"] == 0}
    state = load_file(tmp_path / "trained" / "learned_scales.safetensors")
    for key in [key for key in state if key.endswith("_amax_post")]:
        assert torch.equal(state[key], state[key.replace("_post", "_pre")]) != improved
    export_trained(plan, tmp_path / "trained", tmp_path / "out", device="cpu")
    assert audit(tmp_path / "out", against=tmp_path / "trained").passed


def test_only_trained_matrices_in_formats_that_have_them(tiny: Tiny) -> None:
    assert {item.name for item in FORMATS if item.learned_scales} == set(NVFP4)
    experts = make(tiny("qwen3_moe"), "nvfp4", roles=("routed_expert",))
    assert all(".experts." in name for name in enable_learned_scales(experts))
    with pytest.raises(ToolchainError) as raised:
        enable_learned_scales(make(tiny("llama"), "int8_wo"))
    assert raised.value.code == "TC-260"
