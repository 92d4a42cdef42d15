"""LoRA under fake quantization: what it computes, what it trains, what is written of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from tests.tiny import make_tiny
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.errors import UsageError
from toolchain.core.progress import Silent
from toolchain.modeling.loading import load_checkpoint
from toolchain.plan.steps import Sparsity, Training
from toolchain.plan.types import Plan
from toolchain.qat.lora import add_lora, merge_lora, save_adapters
from toolchain.qat.student import Student, make_student
from toolchain.quantize.accuracy import Applied
from toolchain.quantize.export import Exporter

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 260, (2, 96), generator=torch.Generator().manual_seed(0))
Tiny = Callable[[str], Path]


def lora_plan(source: Path, format_name: str, rank: int = 4, alpha: float = 6.0, **training: Any) -> Plan:
    """Scaled by 1.5, which is no power of two: sums in another order would show."""
    plan = plan_for(source, format_name, policy="all-linear")
    return replace(plan, training=Training(data=(), lora_rank=rank, lora_alpha=alpha, **training))


def adapted(plan: Plan) -> tuple[Student, dict[str, torch.nn.Parameter]]:
    student = make_student(plan, device="cpu")
    return student, add_lora(student)


def move(parameters: dict[str, torch.nn.Parameter], size: float = 0.05) -> None:
    """As if trained: B is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in parameters.items():
        if ".lora_B." in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def write(student: Student, directory: Path) -> Path:
    """The student as it is, packed by the exporter of quantization."""
    applied = Applied(folded_norms=set(student.folded_norms))
    exporter = Exporter(student.model, student.plan, student.family, student.source, applied)
    directory.mkdir()
    exporter.write(directory, Silent())
    return directory


@pytest.mark.parametrize(
    ("kind", "format_name"), [("qwen3_moe", "nvfp4"), ("gpt_oss", "nvfp4"), ("llama", "int4_awq")]
)
def test_adapters_change_nothing_at_first_and_merge_into_what_was_computed(
    tiny: Tiny, kind: str, format_name: str
) -> None:
    student = make_student(lora_plan(tiny(kind), format_name), device="cpu")
    before, modules = logits(student.model), dict(student.model.named_modules())
    parameters = add_lora(student)
    assert torch.equal(logits(student.model), before)
    move(parameters)
    trained = logits(student.model)
    assert not torch.equal(trained, before)
    merge_lora(student)
    assert torch.equal(logits(student.model), trained)
    assert dict(student.model.named_modules()) == modules  # the same Linears, with the same quantizers


def test_the_forward_is_that_of_the_summed_weight_under_the_calibrated_quantizers(tiny: Tiny) -> None:
    """By the definition: Q(W + s * B @ A) on Q(x), from the tensors themselves."""
    student, parameters = adapted(lora_plan(tiny("qwen3_moe"), "nvfp4"))
    move(parameters)
    path = "model.layers.1.mlp.experts.2.down_proj"
    layer: Any = student.model.get_submodule(path)
    inputs = torch.randn(7, 128, generator=torch.Generator().manual_seed(2))
    down, up = (parameters[f"{path}.lora_{name}.default.weight"] for name in "AB")
    with torch.no_grad():
        weight = layer.weight_quantizer(layer.base_layer.weight + 1.5 * (up @ down))
        expected = layer.input_quantizer(inputs) @ weight.T
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)


def test_only_adapters_of_attention_and_experts_are_trained(tiny: Tiny) -> None:
    student, parameters = adapted(lora_plan(tiny("qwen3_moe"), "nvfp4"))
    move(parameters)
    student.model(TOKENS).logits.pow(2).mean().backward()
    names = {name for name, item in student.model.named_parameters() if item.requires_grad}
    assert names == set(parameters) and all(".lora_" in name for name in names)
    assert all(item.grad is not None and item.grad.any() for item in parameters.values())
    assert all(item.grad is None for name, item in student.model.named_parameters() if name not in names)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert sum(".mlp.experts." in name for name in names) == 2 * 2 * 4 * 3


def test_roles_that_were_asked_for_get_adapters_where_they_are_matrices(tiny: Tiny) -> None:
    _, parameters = adapted(lora_plan(tiny("qwen3_moe"), "nvfp4", roles=("attention", "norm")))
    whole = {name for name in parameters if ".lora_" not in name}
    assert whole and all("norm" in name for name in whole)
    assert not any("experts" in name for name in parameters)


def test_autocast_does_not_reach_the_sum_of_the_weights(tiny: Tiny) -> None:
    """In bfloat16 the sum would be another than the one that is merged."""
    student, parameters = adapted(lora_plan(tiny("qwen3_moe"), "nvfp4"))
    move(parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = logits(student.model)
    merge_lora(student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(student.model), trained)


def test_zeros_of_sparse_weights_stay_zeros(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make_tiny("qwen3_moe", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj.weight" in name:
            tensor[:, ::2] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    student, parameters = adapted(replace(lora_plan(source, "nvfp4"), sparsity=Sparsity()))
    move(parameters)
    trained = logits(student.model)
    merge_lora(student)
    assert torch.equal(logits(student.model), trained)
    for path in student.modules:
        weight: Any = student.model.get_submodule(path).weight
        assert not weight[:, ::2].any() and weight[:, 1::2].all()


def test_adapters_on_experts_reach_the_written_bytes(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("qwen3_moe")
    student, _ = adapted(lora_plan(source, "nvfp4"))
    started = CheckpointReader(write_merged(student, tmp_path / "before"))
    add_lora(student)
    move({name: item for name, item in student.model.named_parameters() if ".lora_" in name})
    merge_lora(student)
    for module in student.modules:  # as the trained directory is written: in the dtype of the source
        linear: Any = student.model.get_submodule(module)
        linear.weight.data = linear.weight.data.bfloat16().float()
    output = write(student, tmp_path / "after")
    verdict = audit(output, against=source)
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    written = CheckpointReader(output)
    changed = {
        name
        for name in written.infos
        if not torch.equal(started.get(name).float(), written.get(name).float())
    }
    codes = {name for name in written.infos if "proj.weight" in name and not name.endswith("_2")}
    assert changed == codes and sum(".experts." in name for name in codes) == 2 * 2 * 4 * 3
    model = load_checkpoint(output, device=CPU, dtype=torch.float32)
    assert torch.equal(logits(model), logits(student.model))


@pytest.mark.parametrize(
    ("kind", "format_name"),
    [("llama", "int4_awq"), ("mixtral", "int4_awq"), ("qwen3_moe", "nvfp4"), ("minimax", "nvfp4")],
)
def test_peft_loads_the_adapters_onto_the_unquantized_source(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str
) -> None:
    """What peft's own model computes is what the student computes with quantizers off, channel scales of AWQ too."""
    from modelopt.torch.quantization.nn import TensorQuantizer
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    student, parameters = adapted(lora_plan(tiny(kind), format_name))
    move(parameters)
    assert save_adapters(student, tmp_path)
    for module in student.model.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()  # which leaves its pre_quant_scale at work
    plain = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=torch.float32).eval()
    before = logits(plain)
    change = logits(student.model) - before
    theirs = logits(PeftModel.from_pretrained(plain, tmp_path).eval()) - before
    assert (theirs - change).norm() < 0.02 * change.norm()


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss"])
def test_peft_does_not_load_adapters_onto_other_matrices(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Shared experts beside routed ones, and experts of one tensor: peft would load them elsewhere, with a warning."""
    from peft import PeftConfig
    from safetensors import safe_open

    student, parameters = adapted(lora_plan(tiny(kind), "nvfp4"))
    assert not save_adapters(student, tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(str(tmp_path))
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert len(file.keys()) == len(parameters)


def test_a_rank_larger_than_a_matrix_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match=r"rank 65: .*[kv]_proj has 64 rows") as raised:
        adapted(lora_plan(tiny("llama"), "nvfp4", rank=65))
    assert raised.value.code == "TC-258"


def test_a_head_that_is_the_embedding_takes_no_adapter(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises(UsageError, match="shares its weight with the embedding"):
        adapted(lora_plan(source, "nvfp4", roles=("lm_head",)))


def write_merged(student: Student, directory: Path) -> Path:
    merge_lora(student)
    return write(student, directory)
