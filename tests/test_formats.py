"""Every format and KV cache: quantize, audit, run; against ModelOpt's exporter and its fake-quantized model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import export, plan_for
from tests.tiny import make_tiny
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.errors import ToolchainError
from toolchain.formats import FORMATS, get_format
from toolchain.modeling.loading import load_checkpoint, load_source
from toolchain.quantize.job import calibrate, quantize

CPU = torch.device("cpu")
NAMES = tuple(item.name for item in FORMATS)
OLD = ("fp8", "nvfp4", "int4_awq")
"""tests/test_quantize.py has these on every family."""
Tiny = Callable[[str], Path]


def tokens() -> torch.Tensor:
    return torch.randint(4, 260, (2, 96), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format_name", [name for name in NAMES if name not in OLD])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_every_format_passes_its_audit_and_runs(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str
) -> None:
    """The audit compares bytes with the plan, and what is not quantized with the source."""
    source, output = tiny(kind), tmp_path / "out"
    quantize(plan_for(source, format_name, policy="all-linear"), output, device="cpu")
    verdict = audit(output, against=source)
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    infos = CheckpointReader(output).infos
    part = ".experts." if kind != "llama" else ".mlp."
    dtypes = {item.dtype for name, item in infos.items() if part in name and name.endswith(".weight")}
    assert dtypes == {get_format(format_name).stored[0].dtype}
    with torch.no_grad():
        ours = load_checkpoint(output, device=CPU)(tokens()).logits.float()
        plain = load_source(source, device=CPU)(tokens()).logits.float()
    # Scales that are read wrongly give noise of the size of the logits themselves.
    assert 0 < float((ours - plain).norm() / plain.norm()) < 0.8


@pytest.mark.parametrize("format_name", NAMES)
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_logits_equal_the_model_in_memory(tiny: Tiny, tmp_path: Path, kind: str, format_name: str) -> None:
    """Bit for bit: scales are merged before the export, and fake quantization rounds as the packing does."""
    done = calibrate(plan_for(tiny(kind), format_name, policy="all-linear", recipe="max"), device="cpu")
    model = load_checkpoint(export(done, tmp_path / "out"), device=CPU)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, done.model(tokens()).logits)


def unlike_modelopt(kind: str, format_name: str, name: str) -> str:
    """Why a tensor may differ from what ModelOpt's exporter writes; empty: it may not."""
    if name.endswith("e_score_correction_bias"):
        return "ModelOpt casts it to the model's dtype, we copy the source"
    experts = ".mlp.experts." in name and ("gate_proj" in name or "up_proj" in name)
    per_channel = format_name in ("fp8_per_channel_per_token", "int8_wo", "int8_sq", "int4_gptq", "int4_awq")
    if kind == "qwen3_moe" and experts and (per_channel or format_name == "fp8_block"):
        return (
            "sync_moe_gate_up_amax also equalises scales that no runtime shares: rounder weights for nothing"
        )
    if "shared_experts" in name and name.endswith("pre_quant_scale"):
        return "ModelOpt folds it into a norm that feeds the router and the routed experts, too"
    return ""


@pytest.mark.parametrize(
    ("kind", "format_name"),
    [
        (kind, name)
        for kind in ("llama", "qwen3_moe", "deepseek_v3")
        for name in NAMES
        # FP8: rounded twice there (tests/test_codecs.py). Blocks: it cannot stack the scales of q_a and kv_a. W4A8: it
        # cannot export experts. AWQ's layout is that of GPTQ here.
        if name not in ("fp8", "int4_awq")
        and (kind, name) not in (("deepseek_v3", "fp8_block"), ("qwen3_moe", "w4a8_awq"))
    ],
)
def test_the_exported_bytes_are_those_of_modelopts_own_exporter(
    tmp_path: Path, kind: str, format_name: str
) -> None:
    """Same calibrated model, two exporters. A hidden size of 256 keeps ModelOpt from merging single blocks."""
    from modelopt.torch.export import export_hf_checkpoint

    sizes = {"hidden_size": 256} if kind != "deepseek_v3" else {}
    source = make_tiny(kind, tmp_path / "model", **sizes)
    done = calibrate(plan_for(source, format_name, policy="all-linear", recipe="max"), device="cpu")
    ours = CheckpointReader(export(done, tmp_path / "ours"))
    export_hf_checkpoint(done.model, export_dir=tmp_path / "theirs")
    theirs = CheckpointReader(tmp_path / "theirs")
    compared = 0
    names = {name: name.replace("_inv", "") for name in ours.infos}
    for name, other in names.items():
        if unlike_modelopt(kind, format_name, name):
            continue
        left, right = ours.get(name), theirs.get(other)
        if right.dim() == 4:
            right = right.squeeze(3).squeeze(1)
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        assert torch.equal(left.float(), right.float()), name
        compared += "_scale" in name
    assert compared > 10
    assert set(theirs.infos) <= set(names.values())
    found = json.loads((tmp_path / "ours" / "hf_quant_config.json").read_text())["quantization"]
    wanted = json.loads((tmp_path / "theirs" / "hf_quant_config.json").read_text())["quantization"]
    item = get_format(format_name)
    assert wanted["quant_algo"] in (item.quant_algo, *item.algo_aliases)
    for key in ("group_size", "has_zero_point", "pre_quant_scale", "kv_cache_quant_algo"):
        assert key not in wanted or found[key] == wanted[key]


def test_block_scales_as_modelopt_writes_them_are_read(tmp_path: Path) -> None:
    """quant_algo fp8_pb_wo, weight_scale [rows, 1, columns, 1]: the same numbers under other names."""
    from modelopt.torch.export import export_hf_checkpoint

    source = make_tiny("llama", tmp_path / "model", hidden_size=256)
    done = calibrate(plan_for(source, "fp8_block", policy="all-linear"), device="cpu")
    ours = load_checkpoint(export(done, tmp_path / "ours"), device=CPU)
    export_hf_checkpoint(done.model, export_dir=tmp_path / "theirs")
    assert audit(tmp_path / "theirs", against=source).passed
    theirs = load_checkpoint(tmp_path / "theirs", device=CPU)
    assert torch.equal(ours(tokens()).logits, theirs(tokens()).logits)


def test_blocks_need_no_whole_multiple(tmp_path: Path) -> None:
    """Sizes of 160 and 96: the last block of a row or column is a part of one."""
    source = make_tiny("qwen3_moe", tmp_path / "model", hidden_size=160, moe_intermediate_size=96)
    quantize(plan_for(source, "fp8_block", policy="all-linear"), tmp_path / "out", device="cpu")
    assert audit(tmp_path / "out", against=source).passed
    scales = CheckpointReader(tmp_path / "out").get("model.layers.0.mlp.experts.0.down_proj.weight_scale_inv")
    assert scales.shape == (2, 1)
    assert torch.isfinite(load_checkpoint(tmp_path / "out", device=CPU)(tokens()).logits).all()


def test_channel_scales_apply_without_emulation_and_rounding_does_not(tiny: Tiny, tmp_path: Path) -> None:
    """The weight-only view of a SmoothQuant checkpoint is close to the source; without its channel scales it is not."""
    source = tiny("llama")
    quantize(plan_for(source, "int8_sq"), tmp_path / "out", device="cpu")
    plain = load_source(source, device=CPU)(tokens()).logits.float()
    error = {}
    for emulate in (True, False):
        model = load_checkpoint(tmp_path / "out", device=CPU, emulate_activations=emulate)
        error[emulate] = float((model(tokens()).logits.float() - plain).norm() / plain.norm())
    assert error[False] < error[True] < 0.3


@pytest.mark.parametrize("kv_cache", ["fp8", "fp8_cast", "nvfp4"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_every_kv_cache_is_stored_as_modelopt_does_and_runs_as_in_memory(
    tiny: Tiny, tmp_path: Path, kind: str, kv_cache: str
) -> None:
    from modelopt.torch.export import export_hf_checkpoint

    plan = plan_for(tiny(kind), "w4a16_nvfp4", policy="all-linear", kv_cache=kv_cache)
    done = calibrate(plan, device="cpu")
    directory = export(done, tmp_path / "ours")
    (directory / "plan.json").write_text(json.dumps(plan.to_json()))
    verdict = audit(directory, against=tiny(kind))
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    with torch.no_grad():
        inside = done.model(tokens()).logits
        assert torch.equal(load_checkpoint(directory, device=CPU)(tokens()).logits, inside)
        without = load_checkpoint(directory, device=CPU, emulate_activations=False)
        assert not torch.equal(without(tokens()).logits, inside)
    export_hf_checkpoint(done.model, export_dir=tmp_path / "theirs")
    ours, theirs = CheckpointReader(directory), CheckpointReader(tmp_path / "theirs")
    stored = {name for name in ours.infos if name.endswith(("k_scale", "v_scale"))}
    assert stored == {name for name in theirs.infos if name.endswith(("k_scale", "v_scale"))}
    assert len(stored) == (0 if kv_cache == "fp8_cast" else 4)
    assert all(torch.equal(ours.get(name), theirs.get(name)) for name in stored)
    algos = [
        json.loads((path / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"]
        for path in (directory, tmp_path / "theirs")
    ]
    assert algos[0] == algos[1] == ("NVFP4" if kv_cache == "nvfp4" else "FP8")


def test_several_formats_at_once_get_their_own_quantizers(tiny: Tiny) -> None:
    """Each Linear by ModelOpt's own reading of its quantizers, in one model."""
    from modelopt.torch.export.quant_utils import get_quantization_format

    plan = plan_for(tiny("qwen3_moe"), "nvfp4", policy="all-linear", kv_cache="fp8")
    wanted = {"routed_expert": "w4a8_awq", "attention": "mxfp8"}
    mixed = tuple(
        replace(item, format=wanted[item.role]) if item.role in wanted and item.format == "nvfp4" else item
        for item in plan.assignments
    )
    first = next(i for i, item in enumerate(mixed) if item.role == "attention")
    mixed = (*mixed[:first], replace(mixed[first], format="fp8_block"), *mixed[first + 1 :])
    model: Any = calibrate(replace(plan, assignments=mixed), device="cpu").model
    formats = {
        path: get_quantization_format(module)
        for path, module in model.named_modules()
        if hasattr(module, "weight_quantizer")
    }
    assert formats["model.layers.0.self_attn.q_proj"] == "fp8_pb_wo"
    assert formats["model.layers.1.self_attn.q_proj"] == "mxfp8"
    assert formats["model.layers.1.mlp.experts.3.down_proj"] == "w4a8_awq"
    assert formats["lm_head"] is None


def test_a_module_in_another_format_than_planned_is_an_error(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a preset changes its meaning in a new release: bits or blocks are not what the codec packs."""
    from toolchain.quantize import quantizers

    real = quantizers.quantizer_settings
    monkeypatch.setattr(quantizers, "quantizer_settings", lambda item: real(get_format("mxfp8")))
    with pytest.raises(ToolchainError, match=r"in another format .*mxfp8"):
        calibrate(plan_for(tiny("llama"), "fp8_per_channel_per_token"), device="cpu")


@pytest.mark.parametrize(
    ("format_name", "suffix", "bad"),
    [("mxfp4", "weight_scale", 255), ("mxfp8", "weight_scale", 255), ("fp8_block", "weight_scale_inv", float("nan")),
     ("int8_wo", "weight_scale", 0.0), ("w4a8_awq", "weight_scale_2", float("inf"))],
)  # fmt: skip
def test_a_bad_scale_of_any_format_is_found(
    tiny: Tiny, tmp_path: Path, format_name: str, suffix: str, bad: float
) -> None:
    from safetensors.torch import load_file, save_file

    quantize(plan_for(tiny("llama"), format_name, recipe="max"), tmp_path / "out", device="cpu")
    shard = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(shard)
    name = f"model.layers.1.mlp.down_proj.{suffix}"
    tensors[name].view(-1)[0] = bad
    save_file(tensors, shard, {"format": "pt"})
    findings = [item for item in audit(tmp_path / "out").findings if item.severity == "error"]
    assert [(item.code, item.where) for item in findings] == [("TC-314", name)]
