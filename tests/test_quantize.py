"""Quantize and export, judged by the written bytes: against ModelOpt's own export and its fake-quantized model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import export, plan_for
from tests.tiny import make_tiny
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.formats import get_format
from toolchain.modeling.loading import load_checkpoint, load_source
from toolchain.quantize.job import calibrate, quantize

CPU = torch.device("cpu")
FORMATS = ("fp8", "nvfp4", "int4_awq")
MOE = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "minimax")
DENSE = ("llama", "qwen3", "mistral")
Tiny = Callable[[str], Path]


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("kind", [*MOE, *DENSE])
def test_every_family_and_format_passes_its_audit_and_runs(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str
) -> None:
    source, output = tiny(kind), tmp_path / "out"
    quantize(plan_for(source, format_name, policy="all-linear"), output, device="cpu")
    verdict = audit(output, against=source)
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    if kind in MOE:
        reader = CheckpointReader(output)
        dtype = get_format(format_name).stored[0].dtype
        experts = [
            info for name, info in reader.infos.items() if ".experts." in name and name.endswith(".weight")
        ]
        assert experts and {info.dtype for info in experts} == {dtype}
    model = load_checkpoint(output, device=CPU)
    assert torch.isfinite(model(torch.arange(2, 40)[None]).logits).all()


def test_nvfp4_logits_equal_the_model_that_modelopt_fake_quantized(tiny: Tiny, tmp_path: Path) -> None:
    """Exactly: scales are merged before the export, and the CPU backend rounds as the packing does."""
    done = calibrate(plan_for(tiny("qwen3_moe"), "nvfp4", policy="all-linear"), device="cpu")
    model = load_checkpoint(export(done, tmp_path / "out"), device=CPU)
    tokens = torch.randint(4, 260, (2, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, done.model(tokens).logits)


@pytest.mark.parametrize(("format_name", "kv_cache"), [("fp8", "fp8"), ("int4_awq", "none")])
def test_logits_agree_with_the_model_that_modelopt_fake_quantized(
    tiny: Tiny, tmp_path: Path, format_name: str, kv_cache: str
) -> None:
    """bf16 weights often lie exactly between two codes; ModelOpt's packing divides by the scale and its fake
    quantization multiplies by the reciprocal, so such ties fall either way. Everything else must be equal."""
    done = calibrate(
        plan_for(tiny("llama"), format_name, kv_cache=kv_cache), device="cpu", dtype=torch.float32
    )
    model = load_checkpoint(export(done, tmp_path / "out"), device=CPU, dtype=torch.float32)
    tokens = torch.randint(4, 260, (2, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(tokens).logits, done.model(tokens).logits
        plain = load_source(tiny("llama"), device=CPU, dtype=torch.float32)(tokens).logits
    quantization_error = (theirs - plain).norm()
    assert (ours - theirs).norm() < 0.15 * quantization_error
    different = 0.0
    for name, module in done.model.named_modules():
        quantizer: Any = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            weight = quantizer(module.weight)
            mine = model.get_submodule(name).weight
            different = max(
                different, float(((weight - mine).abs() > 1e-6 * weight.abs().max()).float().mean())
            )
    assert different < 0.02


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama"])
def test_the_exported_bytes_are_those_of_modelopts_own_exporter(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    """Same calibrated model, two exporters: every tensor equal, every name equal, the same exclude list."""
    from modelopt.torch.export import export_hf_checkpoint

    done = calibrate(plan_for(tiny(kind), "nvfp4", policy="all-linear", kv_cache="fp8"), device="cpu")
    ours = CheckpointReader(export(done, tmp_path / "ours"))
    export_hf_checkpoint(done.model, export_dir=tmp_path / "theirs")
    theirs = CheckpointReader(tmp_path / "theirs")
    assert set(ours.infos) == set(theirs.infos)
    for name in ours.infos:
        left, right = ours.get(name), theirs.get(name)
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        assert torch.equal(left.float(), right.float()), name
    left_config = json.loads((tmp_path / "ours" / "hf_quant_config.json").read_text())
    right_config = json.loads((tmp_path / "theirs" / "hf_quant_config.json").read_text())
    assert left_config == right_config


def test_what_is_not_quantized_is_copied_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    source, output = tiny("mixtral"), tmp_path / "out"
    quantize(plan_for(source, "nvfp4"), output, device="cpu")
    before, after = CheckpointReader(source), CheckpointReader(output)
    kept = [name for name in before.infos if ".experts." not in name]
    assert kept and all(torch.equal(before.get(name), after.get(name)) for name in kept)
    excluded = json.loads((output / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert {"lm_head", "model.embed_tokens", "model.layers.1.block_sparse_moe.gate"} <= set(excluded)
    assert "model.layers.1.self_attn*" in excluded
    for name in ("tokenizer.json", "generation_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()


def test_the_same_seed_gives_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    plan = plan_for(tiny("qwen3_moe"), "int4_awq")
    first = quantize(plan, tmp_path / "a", device="cpu")
    second = quantize(plan, tmp_path / "b", device="cpu")
    assert first["files"] == second["files"]
    assert first["calibration"]["tokens_sha256"] == second["calibration"]["tokens_sha256"]


def test_awq_beats_rounding_to_nearest_on_the_calibrated_inputs(tiny: Tiny) -> None:
    """The searched scale must not be worse than none, by the definition of AWQ's loss, computed from raw inputs."""
    from toolchain.codecs import int4_awq
    from toolchain.quantize.accuracy.awq import search
    from toolchain.quantize.accuracy.statistics import InputStatistics

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 256, generator=generator) * torch.logspace(-2, 1, 256)
    weight = torch.randn(64, 256, generator=generator)
    statistics = InputStatistics()
    for part in inputs.split(100):
        statistics.add(part)
    scale, alpha = search([weight], statistics)

    def loss(factor: torch.Tensor) -> float:
        quantized = int4_awq.fake_quantize(weight * factor)
        return float(((inputs / factor) @ quantized.T - inputs @ weight.T).pow(2).mean())

    assert loss(scale) < 0.8 * loss(torch.ones(256))
    assert 0 < alpha <= 1


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_awq_in_many_passes_is_awq_in_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Too little memory for all Gram matrices: later passes run over scaled weights and must see what the first saw."""
    from toolchain.quantize import accuracy

    plan = plan_for(tiny(kind), "int4_awq", policy="all-linear")
    one = calibrate(plan, device="cpu", dtype=torch.float32)
    monkeypatch.setattr(accuracy, "GRAM_BUDGET_BYTES", 1)
    many = calibrate(plan, device="cpu", dtype=torch.float32)
    assert many.coverage == one.coverage
    assert many.manifest["awq_alpha"] == one.manifest["awq_alpha"]
    tokens = torch.randint(4, 260, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(many.model(tokens).logits, one.model(tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("format_name", FORMATS)
def test_experts_without_tokens_are_reported_and_still_complete(tmp_path: Path, format_name: str) -> None:
    """Router rows (a, -a, b, -b, 0, 0) with top-2: one of each pair is above zero, so experts 4 and 5 never win."""
    from safetensors.torch import load_file, save_file

    source = make_tiny("mixtral", tmp_path / "model", num_local_experts=6)
    tensors = load_file(source / "model.safetensors")
    gate = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    gate[1], gate[3], gate[4:] = -gate[0], -gate[2], 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    manifest = quantize(plan_for(source, format_name), tmp_path / "out", device="cpu")
    coverage = json.loads((tmp_path / "out" / "coverage.json").read_text())
    counts = coverage["layers"]["model.layers.0.mlp.experts"]["tokens"]
    assert counts[4:] == [0, 0] and min(counts[:4]) > 0 and sum(counts) == 8 * 128 * 2
    assert [pair for pair in manifest["starved_experts"] if "layers.0." in pair[0]] == [
        ["model.layers.0.mlp.experts", 4],
        ["model.layers.0.mlp.experts", 5],
    ]
    verdict = audit(tmp_path / "out", against=source)
    assert verdict.passed, [str(finding) for finding in verdict.findings]


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_expert_of_zeros_stays_one(tmp_path: Path, format_name: str) -> None:
    """A pruned expert has nothing to scale: its scales must still be positive, its weights exactly zero."""
    from safetensors.torch import load_file, save_file

    source = make_tiny("qwen3_moe", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"model.layers.0.mlp.experts.1.{projection}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(plan_for(source, format_name), tmp_path / "out", device="cpu")
    assert audit(tmp_path / "out", against=source).passed
    model: Any = load_checkpoint(tmp_path / "out", device=CPU)
    assert not model.get_submodule("model.layers.0.mlp.experts.1.up_proj").weight.any()
    assert torch.isfinite(model(torch.arange(2, 40)[None]).logits).all()


def test_bad_calibration_data_is_one_clear_error_and_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    from dataclasses import replace

    plan = plan_for(tiny("llama"), "fp8")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    cases = {
        str(tmp_path / "absent.jsonl"): "does not exist",
        str(tmp_path / "short.txt"): "one sample needs 128",
        str(tmp_path / "bad.jsonl"): "bad.jsonl:2",
    }
    for data, said in cases.items():
        broken = replace(plan, calibration=replace(plan.calibration, data=data))
        with pytest.raises((UsageError, ToolchainError), match=said):
            quantize(broken, tmp_path / "out", device="cpu")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))


def test_too_small_a_disk_is_refused_before_any_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ToolchainError, match="GiB free"):
        quantize(plan_for(tiny("llama"), "fp8"), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_source_with_a_missing_expert_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """transformers would fill the hole with random numbers."""
    import shutil

    from safetensors.torch import load_file, save_file

    source = tmp_path / "model"
    shutil.copytree(tiny("qwen3_moe"), source)
    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts.3." not in name}
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ToolchainError, match=r"does not hold|cannot load"):
        quantize(plan_for(source, "fp8"), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_model_without_weights_is_refused_before_anything_else(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    (tmp_path / "model").mkdir()
    shutil.copy(tiny("mixtral") / "config.json", tmp_path / "model")
    plan = plan_for(tmp_path / "model", "fp8")
    with pytest.raises(ToolchainError, match="no safetensors files"):
        quantize(plan, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
