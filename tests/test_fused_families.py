"""gpt-oss and Llama 4: experts stored fused and input-first, unfused in memory, exported as ModelOpt and the hub do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from tests.tiny import make_llama4_wrapper
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.files import atomic_write_json
from toolchain.core.progress import Silent
from toolchain.modeling.loading import load_checkpoint, load_source
from toolchain.models.reader import read_model
from toolchain.quantize.job import calibrate, quantize
from toolchain.quantize.routing import Widening

CPU = torch.device("cpu")
FUSED = ("gpt_oss", "llama4_text")
Tiny = Callable[[str], Path]


def sample() -> torch.Tensor:
    return torch.randint(4, 260, (2, 96), generator=torch.Generator().manual_seed(0))


def transformers_model(source: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, experts_implementation="eager").eval()


def output_directory(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("kind", FUSED)
@torch.no_grad()
def test_unfused_experts_compute_what_transformers_computes(tiny: Tiny, kind: str) -> None:
    """float32, 1e-5: one matmul per expert and projection adds the same products in another order."""
    ours = load_source(tiny(kind), device=CPU, dtype=torch.float32)
    theirs = transformers_model(tiny(kind))
    torch.testing.assert_close(ours(sample()).logits, theirs(sample()).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gpt_oss_clamps_and_biases_are_kept(tmp_path: Path) -> None:
    """Weights so large that gate and up pass the limit of 7, and biases that are not zero."""
    from safetensors.torch import load_file, save_file

    from tests.tiny import make_tiny

    source = make_tiny("gpt_oss", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in tensors:
        if name.endswith("gate_up_proj"):
            tensors[name] *= 20
        if name.endswith("_bias"):
            tensors[name] = torch.randn(tensors[name].shape, generator=generator).to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ours: Any = load_source(source, device=CPU, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    ours.get_submodule("model.layers.0.mlp.experts.0.gate_proj").register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    logits = ours(sample()).logits
    assert seen[0].max() > 7
    torch.testing.assert_close(logits, transformers_model(source)(sample()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format_name", ["nvfp4", "fp8", "w4a16_nvfp4"])
@pytest.mark.parametrize("kind", FUSED)
def test_every_format_passes_its_audit_and_runs(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str
) -> None:
    source, output = tiny(kind), tmp_path / "out"
    done = calibrate(plan_for(source, format_name, policy="all-linear"), device="cpu")
    done.exporter.write(output_directory(output), Silent())
    atomic_write_json(output / "plan.json", done.exporter.plan.to_json())
    model = load_checkpoint(output, device=CPU)
    with torch.no_grad():
        assert torch.equal(model(sample()).logits, done.model(sample()).logits)
    verdict = audit(output, against=source)
    assert not verdict.findings, [str(finding) for finding in verdict.findings]
    assert verdict.facts["parameters"] == read_model(str(source)).parameters


def test_the_multimodal_wrapper_of_llama4_is_quantized_and_keeps_its_tower(tmp_path: Path) -> None:
    source, output = make_llama4_wrapper(tmp_path / "model"), tmp_path / "out"
    quantize(plan_for(source, "nvfp4", policy="experts-only"), output, device="cpu")
    verdict = audit(output, against=source)
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    before, after = CheckpointReader(source), CheckpointReader(output)
    kept = [name for name in before.infos if name.startswith(("vision_model.", "multi_modal_projector."))]
    assert kept and all(torch.equal(before.get(name), after.get(name)) for name in kept)
    experts = "language_model.model.layers.1.feed_forward.experts.gate_up_proj"
    assert after.infos[experts].dtype == "U8" and f"{experts}_weight_scale" in after.infos
    assert torch.isfinite(load_checkpoint(output, device=CPU)(sample()).logits).all()


@pytest.mark.parametrize("recipe", ["gptq", "window"])
def test_recipes_keep_one_scale_for_all_experts(tiny: Tiny, tmp_path: Path, recipe: str) -> None:
    output = tmp_path / "out"
    quantize(plan_for(tiny("gpt_oss"), "nvfp4", policy="experts-only", recipe=recipe), output, device="cpu")
    assert not audit(output, against=tiny("gpt_oss")).findings


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("mode", ["topk", "all"])
def test_every_calibration_mode_sees_the_experts(tiny: Tiny, tmp_path: Path, kind: str, mode: str) -> None:
    plan = plan_for(tiny(kind), "nvfp4", policy="experts-only")
    plan = replace(plan, calibration=replace(plan.calibration, mode=mode, topk_ratio=0.75))
    done = calibrate(plan, device="cpu")
    seen = [layer["seen"] for layer in done.coverage["layers"].values()]
    tokens = 8 * 128
    assert len(seen) == 2
    assert all(sum(layer) == tokens * (4 if mode == "all" else 3) for layer in seen)


@pytest.mark.parametrize("kv_cache", ["fp8", "nvfp4"])
@pytest.mark.parametrize("kind", FUSED)
@torch.no_grad()
def test_quantized_kv_caches_run_as_they_were_calibrated(
    tiny: Tiny, tmp_path: Path, kind: str, kv_cache: str
) -> None:
    """gpt-oss has attention sinks, and no implementation but its own."""
    done = calibrate(plan_for(tiny(kind), "nvfp4", policy="experts-only", kv_cache=kv_cache), device="cpu")
    done.exporter.write(output_directory(tmp_path / "out"), Silent())
    assert not audit(tmp_path / "out", against=tiny(kind)).findings
    model = load_checkpoint(tmp_path / "out", device=CPU)
    assert torch.equal(model(sample()).logits, done.model(sample()).logits)
    plain = load_checkpoint(tmp_path / "out", device=CPU, emulate_activations=False)
    assert not torch.equal(plain(sample()).logits, model(sample()).logits)


@torch.no_grad()
def test_llama4_experts_are_observed_on_inputs_that_the_router_scaled(tiny: Tiny) -> None:
    """In mode ``all``: hidden * sigmoid(its logit), for every token and expert, as if each had been chosen."""
    model: Any = load_source(tiny("llama4_text"), device=CPU, dtype=torch.float32)
    settings = replace(plan_for(tiny("llama4_text"), "nvfp4").calibration, mode="all")
    block = model.get_submodule("model.layers.0.feed_forward")
    hidden = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    seen: list[list[torch.Tensor]] = [[] for _ in block.experts]
    for expert, inputs in zip(block.experts, seen, strict=True):
        expert.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
    with Widening(model, settings).active():
        block(hidden)
    logits = hidden @ block.router.weight.T
    for index, inputs in enumerate(seen):
        expected = hidden * logits[:, index : index + 1].sigmoid()
        both = [rows[rows[:, 0].argsort()] for rows in (torch.cat(inputs), expected)]
        torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=1e-5)


def test_faults_in_fused_experts_are_found(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    sound = tmp_path / "sound"
    quantize(plan_for(tiny("llama4_text"), "nvfp4", policy="experts-only"), sound, device="cpu")
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    faults: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
        "no_scale": (lambda t: t.pop(f"{name}_weight_scale_2"), "TC-310"),
        "no_input": (lambda t: t.pop(f"{name}_input_scale"), "TC-310"),
        "one_expert_less": (lambda t: t.update({name: t[name][:3].clone()}), "TC-312"),
        "not_transposed": (lambda t: t.update({name: t[name].transpose(1, 2).contiguous()}), "TC-312"),
        "not_finite": (lambda t: t[f"{name}_weight_scale_2"].fill_(torch.nan), "TC-314"),
        "experts_left_in_bf16": (lambda t: _restore(t, tiny("llama4_text"), name), "TC-322"),
        "scales_of_one_expert_less": (
            lambda t: t.update({f"{name}_weight_scale": t[f"{name}_weight_scale"][:3].clone()}),
            "TC-312",
        ),
        "gone": (lambda t: [t.pop(key) for key in list(t) if key.startswith(name)], "TC-318"),
    }
    for fault, (change, code) in faults.items():
        broken = tmp_path / fault
        shutil.copytree(sound, broken)
        tensors = load_file(broken / "model.safetensors")
        change(tensors)
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        assert code in {item.code for item in audit(broken).findings}, fault


def _restore(tensors: dict[str, torch.Tensor], source: Path, name: str) -> None:
    for key in [key for key in tensors if key.startswith(name)]:
        del tensors[key]
    tensors[name] = CheckpointReader(source).get(name)
