"""What was trained is what ships: the student in memory, the written directory and the checkpoint compute the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.students import assert_plain, differing, logits, student_plan, train
from tests.tiny import KINDS, make_fp8_source, make_llama4_wrapper, make_mxfp4_source, make_tiny
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.errors import ToolchainError
from toolchain.formats import FORMATS
from toolchain.modeling.loading import load_checkpoint
from toolchain.plan.types import Plan
from toolchain.qat.export import export_trained
from toolchain.qat.student import Student, make_student
from toolchain.qat.trained import settle, write_trained
from toolchain.quantize.job import quantize

CPU = torch.device("cpu")
NAMES = tuple(item.name for item in FORMATS)
Tiny = Callable[[str], Path]


def trained_and_exported(plan: Plan, tmp_path: Path) -> tuple[Student, Path, Path]:
    student = make_student(plan, device="cpu")
    train(student)
    write_trained(student, tmp_path / "trained", {"steps": 2})
    export_trained(plan, tmp_path / "trained", tmp_path / "out", device="cpu")
    return student, tmp_path / "trained", tmp_path / "out"


def check(student: Student, trained: Path, output: Path) -> None:
    """Bit for bit in float32; and the bytes are sound, against the trained model."""
    ours = load_checkpoint(output, device=CPU, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(student.model))
    verdict = audit(output, against=trained)
    assert verdict.passed, [str(finding) for finding in verdict.findings]


@pytest.mark.parametrize("format_name", NAMES)
@pytest.mark.parametrize("kind", ["qwen3_moe", "llama"])
def test_the_checkpoint_computes_what_the_student_computes(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str
) -> None:
    plan = student_plan(tiny(kind), format_name)
    student, trained, output = trained_and_exported(plan, tmp_path)
    check(student, trained, output)
    before, after = CheckpointReader(tiny(kind)), CheckpointReader(trained)
    assert before.infos.keys() == after.infos.keys()
    for name, info in before.infos.items():
        assert (info.dtype, info.shape) == (after.infos[name].dtype, after.infos[name].shape)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("qwen3_moe", "llama")])
def test_every_family_ships_what_it_trained(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Per-expert and fused storage, biases, MLA, shared experts: also plain transformers reads what was written."""
    plan = student_plan(tiny(kind), "nvfp4")
    student, trained, output = trained_and_exported(plan, tmp_path)
    check(student, trained, output)
    assert_plain(student, trained)
    changed = differing(tiny(kind), trained)
    kept = ("norm", "router", "embed", "lm_head", "mlp.gate.")
    assert changed and not [name for name in changed for part in kept if part in name]


@pytest.mark.parametrize("format_name", ["int4_awq", "int8_sq", "w4a8_awq"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "llama"])
def test_channel_scales_are_folded_or_taken_out_of_the_written_model(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str
) -> None:
    """What plain transformers computes on it is the student without rounding."""
    plan = student_plan(tiny(kind), format_name, recipe="smoothquant" if format_name == "int8_sq" else "awq")
    student = make_student(plan, device="cpu")
    assert student.folded_norms
    train(student)
    write_trained(student, tmp_path / "trained", {})
    assert_plain(student, tmp_path / "trained")
    stored = CheckpointReader(tmp_path / "trained").infos
    assert not [name for name in stored if "scale" in name]
    settled = {name: item.clone() for name, item in student.model.named_parameters()}
    settle(student)
    assert all(torch.equal(item, settled[name]) for name, item in student.model.named_parameters())


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text"])
def test_channels_in_another_order_are_trained_and_written_there(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    plan = student_plan(tiny(kind), "nvfp4", recipe="arrange")
    student, trained, output = trained_and_exported(plan, tmp_path)
    assert student.details["arranged"]
    check(student, trained, output)
    assert_plain(student, trained)


@pytest.mark.parametrize("kv_cache", ["fp8", "fp8_cast", "nvfp4"])
def test_the_scales_of_the_kv_cache_stay_as_calibrated(tiny: Tiny, tmp_path: Path, kv_cache: str) -> None:
    plan = student_plan(tiny("qwen3_moe"), "w4a16_nvfp4", kv_cache=kv_cache)
    student, trained, output = trained_and_exported(plan, tmp_path)
    check(student, trained, output)
    quantize(replace(plan, training=None), tmp_path / "untrained", device="cpu")
    ours, theirs = CheckpointReader(output), CheckpointReader(tmp_path / "untrained")
    scales = [name for name in theirs.infos if name.endswith(("k_scale", "v_scale"))]
    assert len(scales) == (0 if kv_cache == "fp8_cast" else 4)
    assert all(torch.equal(ours.get(name), theirs.get(name)) for name in scales)


@pytest.mark.parametrize(("source", "format_name"), [("fp8", "fp8_block"), ("mxfp4", "nvfp4")])
def test_a_quantized_source_becomes_a_plain_model_that_is_trained(
    tiny: Tiny, tmp_path: Path, source: str, format_name: str
) -> None:
    """Also in the format that it has already: its numbers move."""
    if source == "fp8":
        model = make_fp8_source(tiny("qwen3_moe"), tmp_path / "model")
    else:
        model = make_mxfp4_source(tiny("gpt_oss"), tmp_path / "model")
    student, trained, output = trained_and_exported(student_plan(model, format_name), tmp_path)
    check(student, trained, output)
    assert_plain(student, trained)
    assert "quantization_config" not in json.loads((trained / "config.json").read_text())
    assert {info.dtype for info in CheckpointReader(trained).infos.values()} == {"BF16"}


@pytest.mark.parametrize("format_name", ["nvfp4", "int4_awq"])
def test_a_source_in_float32_stays_in_float32(tiny: Tiny, tmp_path: Path, format_name: str) -> None:
    """Its unfused experts are views of one tensor until the student has them."""
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny("qwen3_moe"), tmp_path / "model")
    noise = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor.float() + 1e-4 * torch.randn(tensor.shape, generator=noise)
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    student, trained, output = trained_and_exported(student_plan(model, format_name), tmp_path)
    check(student, trained, output)
    assert {info.dtype for info in CheckpointReader(trained).infos.values()} == {"F32"}
    assert differing(model, trained)


def test_the_towers_of_a_wrapper_travel_along(tmp_path: Path) -> None:
    model = make_llama4_wrapper(tmp_path / "model")
    student, trained, output = trained_and_exported(student_plan(model, "nvfp4"), tmp_path)
    check(student, trained, output)
    changed = differing(model, trained)
    assert changed and all(name.startswith("language_model.") for name in changed)


def test_biases_of_fused_experts_are_trained_with_their_matrices(tiny: Tiny, tmp_path: Path) -> None:
    plan = student_plan(tiny("gpt_oss"), "nvfp4", roles=("routed_expert",))
    _, trained, _ = trained_and_exported(plan, tmp_path)
    changed = differing(tiny("gpt_oss"), trained)
    kinds = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    assert changed == {f"model.layers.{layer}.mlp.experts.{kind}" for layer in (0, 1) for kind in kinds}


def test_learned_block_scales_are_packed_as_they_were_trained(tiny: Tiny, tmp_path: Path) -> None:
    from toolchain.qat.learned_scales import enable_learned_scales

    plan = student_plan(tiny("qwen3_moe"), "nvfp4")
    assert plan.training
    plan = replace(plan, training=replace(plan.training, learned_scales=True))
    student = make_student(plan, device="cpu")
    scales = enable_learned_scales(student)
    train(student, learned=scales)
    write_trained(student, tmp_path / "trained", {})
    export_trained(plan, tmp_path / "trained", tmp_path / "out", device="cpu")
    ours = load_checkpoint(tmp_path / "out", device=CPU, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(student.model))


@pytest.mark.parametrize("format_name", ["nvfp4", "int4_awq", "fp8_block"])
def test_zeros_stay_zeros(tmp_path: Path, format_name: str) -> None:
    """Every second pair of weights is zero in the source and held there while training: so it is in what is packed."""
    from safetensors.torch import load_file, save_file

    source = make_tiny("qwen3_moe", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    pattern = torch.tensor([1, 0, 0, 1], dtype=torch.bfloat16).repeat(128 // 4)
    experts = [name for name in tensors if ".experts." in name]
    for name in experts:
        tensors[name] *= pattern
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = student_plan(source, format_name)
    student = make_student(plan, device="cpu")
    train(student)
    with torch.no_grad():
        for path in student.modules:
            if ".experts." in path:
                student.model.get_submodule(path).weight.mul_(pattern.float())
    write_trained(student, tmp_path / "trained", {})
    export_trained(plan, tmp_path / "trained", tmp_path / "out", device="cpu")
    check(student, tmp_path / "trained", tmp_path / "out")
    model: Any = load_checkpoint(tmp_path / "out", device=CPU)
    for name in experts:
        groups = model.get_submodule(name.removesuffix(".weight")).weight.unflatten(1, (-1, 4))
        assert not groups[..., 1:3].any() and groups.any()


def test_without_a_step_the_bytes_are_those_of_plain_quantization(tiny: Tiny, tmp_path: Path) -> None:
    """Training starts from exactly what quantization alone ships."""
    plan = student_plan(tiny("qwen3_moe"), "nvfp4", kv_cache="fp8")
    write_trained(make_student(plan, device="cpu"), tmp_path / "trained", {"steps": 0})
    assert differing(tiny("qwen3_moe"), tmp_path / "trained") == set()
    manifest = export_trained(plan, tmp_path / "trained", tmp_path / "out", device="cpu")
    plain = quantize(replace(plan, training=None), tmp_path / "plain", device="cpu")
    assert differing(tmp_path / "plain", tmp_path / "out") == set()
    for name in ("config.json", "hf_quant_config.json", "coverage.json", "tokenizer.json"):
        assert manifest["files"][name] == plain["files"][name]
    assert manifest["training"] == {"steps": 0}
    assert manifest.keys() - {"training"} == plain.keys()
    assert manifest["calibration"] == plain["calibration"]


def test_what_does_not_belong_together_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    plan = student_plan(tiny("llama"), "nvfp4")
    trained, output = tmp_path / "trained", tmp_path / "out"
    write_trained(make_student(plan, device="cpu"), trained, {})
    for other, said in (
        (student_plan(tiny("llama"), "fp8"), "another assignments_sha256, format"),
        (student_plan(tiny("qwen3"), "nvfp4"), "another .*model_identity"),
    ):
        with pytest.raises(ToolchainError, match=said):
            export_trained(other, trained, output, device="cpu")
    with pytest.raises(ToolchainError, match=r"no training\.json"):
        export_trained(plan, tiny("llama"), output, device="cpu")
    file = trained / "quantizers.safetensors"
    state = load_file(file)
    save_file({name: tensor * 2 for name, tensor in state.items()}, file)
    with pytest.raises(ToolchainError, match="was changed"):
        export_trained(plan, trained, output, device="cpu")
    assert not output.exists() and not list(tmp_path.glob(".out*"))
