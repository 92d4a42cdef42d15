"""The trainable quantized model: what is trained, what its gradients are, and which ranges follow the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.students import logits, student_plan, tokens
from tests.tiny import KINDS, make_tiny
from tests.training import Notes
from toolchain.codecs import Calibrated, get_codec
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.formats import FORMATS
from toolchain.plan.steps import Sparsity, Training
from toolchain.qat.roles import trainable_parameters
from toolchain.qat.student import load_start, make_student, save_start
from toolchain.quantize.job import calibrate

CPU = torch.device("cpu")
NAMES = tuple(item.name for item in FORMATS)
Tiny = Callable[[str], Path]


def test_the_student_begins_where_plain_quantization_ends(tiny: Tiny) -> None:
    """Float32 weights with the values of the calibrated model, and its ranges."""
    plan = student_plan(tiny("qwen3_moe"), "nvfp4", kv_cache="fp8")
    student = make_student(plan, device="cpu")
    assert {item.dtype for item in student.model.parameters()} == {torch.float32}
    done = calibrate(replace(plan, training=None), device="cpu").model.float()
    with torch.no_grad():
        assert torch.equal(logits(student.model), done(tokens(9)).logits)


@pytest.mark.parametrize(
    ("format_name", "kv_cache"), [("nvfp4", "fp8"), ("int4_awq", "none"), ("w4a8_awq", "nvfp4")]
)
def test_a_saved_start_is_the_same_student(
    tiny: Tiny, tmp_path: Path, format_name: str, kv_cache: str
) -> None:
    plan = student_plan(tiny("qwen3_moe"), format_name, kv_cache=kv_cache)
    student = make_student(plan, device="cpu")
    save_start(student, tmp_path / "start")
    again = load_start(plan, tmp_path / "start", device="cpu")
    assert torch.equal(logits(again.model), logits(student.model))
    old, new = student.model.state_dict(), again.model.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(tensor, old[name]) for name, tensor in new.items())
    assert (again.modules, again.folded_norms, again.details) == (
        student.modules,
        student.folded_norms,
        student.details,
    )
    assert again.coverage == student.coverage and again.manifest == student.manifest


def test_a_saved_start_keeps_the_zeros_of_sparsity(tiny: Tiny, tmp_path: Path) -> None:
    plan = replace(student_plan(tiny("llama"), "nvfp4"), sparsity=Sparsity(method="magnitude"))
    student = make_student(plan, device="cpu")
    save_start(student, tmp_path / "start")
    again = load_start(plan, tmp_path / "start", device="cpu")
    assert torch.equal(logits(again.model), logits(student.model))
    for path in again.modules:
        groups = again.model.get_submodule(path).weight.unflatten(1, (-1, 4))
        assert ((groups != 0).sum(-1) <= 2).all()


def test_a_start_of_another_plan_or_a_changed_one_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    plan = student_plan(tiny("llama"), "nvfp4")
    save_start(make_student(plan, device="cpu"), tmp_path / "start")
    other = replace(plan, calibration=replace(plan.calibration, seed=1))
    with pytest.raises(ToolchainError, match="another calibration"):
        load_start(other, tmp_path / "start", device="cpu")
    # What does not decide the start may differ.
    load_start(replace(plan, training=Training(data=("other",), steps=3)), tmp_path / "start", device="cpu")
    path = tmp_path / "start" / "quantizers.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ToolchainError, match="was changed"):
        load_start(plan, tmp_path / "start", device="cpu")


@pytest.mark.parametrize("format_name", NAMES)
def test_every_trained_weight_gets_the_gradient_of_what_was_computed(tiny: Tiny, format_name: str) -> None:
    """Straight through: the gradient of a matrix is that of its rounded values, on the rounded inputs."""
    student = make_student(student_plan(tiny("llama"), format_name), device="cpu")
    trainable_parameters(student)
    linear: Any = student.model.get_submodule("model.layers.0.mlp.gate_proj")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, linear.in_features, generator=generator, requires_grad=True)
    upstream = torch.randn(5, linear.out_features, generator=generator)
    (linear(x) * upstream).sum().backward()
    with torch.no_grad():
        rounded, weight = linear.input_quantizer(x), linear.weight_quantizer(linear.weight)
        scale = linear.input_quantizer.pre_quant_scale
        through = upstream @ weight * (1 if scale is None else scale)
    torch.testing.assert_close(linear.weight.grad, upstream.T @ rounded)
    torch.testing.assert_close(x.grad, through)


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_are_finite_and_reach_every_expert_with_tokens(tiny: Tiny, kind: str) -> None:
    student = make_student(student_plan(tiny(kind), "nvfp4"), device="cpu")
    trained = trainable_parameters(student)
    seen = _experts_with_tokens(student.model)
    batch = tokens()
    student.model(batch).logits[:, :-1].log_softmax(-1).gather(2, batch[:, 1:, None]).mean().backward()
    for name, parameter in trained.items():
        expert = name.partition(".experts.")[2].partition(".")[0]
        idle = expert and (name.partition(".experts.")[0], int(expert)) not in seen
        if idle:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            # A softmax does not see what is added to every key of a head.
            assert parameter.grad.any() or name.endswith("k_proj.bias"), name
    frozen = [name for name, item in student.model.named_parameters() if name not in trained]
    assert frozen and not any(student.model.get_parameter(name).requires_grad for name in frozen)


def _experts_with_tokens(model: Any) -> set[tuple[str, int]]:
    """(path of the block, expert) of each that some token of ``tokens()`` is sent to; filled by the next forward."""
    from toolchain.modeling.experts import UnfusedExperts

    seen: set[tuple[str, int]] = set()
    for path, module in model.named_modules():
        if isinstance(module, UnfusedExperts):
            block = path.removesuffix(".experts")
            module.register_forward_pre_hook(
                lambda _, args, block=block: seen.update((block, int(i)) for i in args[1].unique())
            )
    return seen


@pytest.mark.parametrize("format_name", NAMES)
def test_rounding_follows_the_weights_as_packing_does(tiny: Tiny, format_name: str) -> None:
    """Weights four times as large: what the student computes on is what the codec packs, under the ranges it keeps."""
    student = make_student(student_plan(tiny("llama"), format_name, recipe="max"), device="cpu")
    linear: Any = student.model.get_submodule("model.layers.1.mlp.down_proj")
    amax = linear.weight.detach().abs().amax()
    with torch.no_grad():
        linear.weight.mul_(4 * torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(0)))
        rounded = linear.weight_quantizer(linear.weight)
        found = Calibrated(weight_amax=amax, input_amax=torch.tensor(1.0))
        codec = get_codec(format_name)
        expected = codec.unpack(codec.pack(linear.weight, found), torch.float32)
    assert torch.equal(rounded, expected)


def test_by_default_the_roles_of_the_quantized_matrices_are_trained(tiny: Tiny) -> None:
    plan = student_plan(tiny("qwen2_moe"), "nvfp4", policy="experts-only")
    student = make_student(plan, device="cpu")
    trained = trainable_parameters(student)
    assert set(trained) == {f"{path}.weight" for path in student.modules}
    assert all(".experts." in name or ".shared_expert." in name for name in trained)
    attention = replace(
        student, plan=student_plan(tiny("qwen2_moe"), "nvfp4", roles=("attention", "router", "norm"))
    )
    names = set(trainable_parameters(attention))
    assert "model.layers.0.self_attn.q_proj.bias" in names and "model.layers.1.mlp.gate.weight" in names
    assert "model.norm.weight" in names and not [name for name in names if ".experts." in name]
    assert all(item.requires_grad == (name in names) for name, item in student.model.named_parameters())


@pytest.mark.parametrize("role", ["embedding", "lm_head"])
def test_a_tied_head_is_trained_by_either_name_and_said(tmp_path: Path, role: str) -> None:
    source = make_tiny("llama", tmp_path / "model", tie_word_embeddings=True)
    student = make_student(student_plan(source, "nvfp4", roles=(role,)), device="cpu")
    notes = Notes()
    trained = trainable_parameters(student, notes)
    assert list(trained) == ["model.embed_tokens.weight"]
    assert trained["model.embed_tokens.weight"] is student.model.get_parameter("lm_head.weight")
    assert len(notes.lines) == 1 and "same tensor" in notes.lines[0]


def test_a_role_that_the_model_lacks_is_a_usage_error(tiny: Tiny) -> None:
    student = make_student(student_plan(tiny("llama"), "nvfp4", roles=("shared_expert",)), device="cpu")
    with pytest.raises(UsageError, match="shared_expert") as error:
        trainable_parameters(student)
    assert "attention" in error.value.hint


@pytest.mark.parametrize(
    ("format_name", "recipe"), [("nvfp4", "mse"), ("int4_awq", "awq+clip"), ("fp8", "gptq")]
)
def test_recipes_that_choose_codes_or_scales_cannot_be_trained(
    tiny: Tiny, format_name: str, recipe: str
) -> None:
    with pytest.raises(ToolchainError) as error:
        make_student(student_plan(tiny("llama"), format_name, recipe=recipe), device="cpu")
    assert error.value.code == "TC-250"
