"""Sources that are already quantized: planned as the BF16 model, dequantized as published, cast where that is exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from tests.tiny import make_fp8_source, make_mxfp4_source, make_tiny
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.checkpoint.source import open_source
from toolchain.core.errors import ToolchainError
from toolchain.modeling.loading import load_checkpoint, load_source
from toolchain.models.reader import read_model
from toolchain.plan.planner import make_plan
from toolchain.quantize.job import quantize

CPU = torch.device("cpu")
Tiny = Callable[[str], Path]
EVEN = {"kv_lora_rank": 96}
"""Makes every matrix of the tiny DeepSeek-V3 a multiple of 128 rows: transformers divides others into other blocks."""


def sample() -> torch.Tensor:
    return torch.randint(4, 260, (2, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fp8(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fp8_source(tiny("deepseek_v3"), tmp_path_factory.mktemp("fp8") / "model")


@pytest.fixture(scope="module")
def mxfp4(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mxfp4_source(tiny("gpt_oss"), tmp_path_factory.mktemp("mxfp4") / "model")


def published_fp8(reader: CheckpointReader, name: str) -> torch.Tensor:
    """value[i, j] = weight[i, j] * scale[i // 128, j // 128], as DeepSeek's own conversion computes it."""
    weight, scale = reader.get(name).float(), reader.get(f"{name}_scale_inv")
    rows, columns = (torch.arange(size) // 128 for size in weight.shape)
    return (weight * scale[rows][:, columns]).to(torch.bfloat16)


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss"])
def test_a_quantized_source_is_planned_as_the_model_that_it_stands_for(
    tiny: Tiny, fp8: Path, mxfp4: Path, kind: str
) -> None:
    source = {"deepseek_v3": fp8, "gpt_oss": mxfp4}[kind]
    plain, read = read_model(str(tiny(kind))), read_model(str(source))
    assert {(info.name, info.shape, info.dtype) for info in read.tensors} == {
        (info.name, info.shape, info.dtype) for info in plain.tensors
    }
    assert read.parameters == plain.parameters and read.bytes == plain.bytes
    assert read.source_bytes == sum(info.bytes for info in CheckpointReader(source).infos.values())
    assert read.source_bytes < plain.source_bytes


def test_fp8_blocks_are_dequantized_as_published(fp8: Path) -> None:
    stored, values = CheckpointReader(fp8), open_source(fp8)
    names = [name for name in stored.infos if stored.infos[name].dtype == "F8_E4M3"]
    assert any(stored.infos[name].shape[0] % 128 for name in names)
    for name in names:
        assert torch.equal(values.get(name), published_fp8(stored, name)), name


def test_fp8_source_runs_as_transformers_dequantizes_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    source = make_fp8_source(make_tiny("deepseek_v3", tmp_path / "plain", **EVEN), tmp_path / "fp8")
    config = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16, experts_implementation="eager"
    ).eval()
    state = theirs.state_dict()
    for name, tensor in load_source(source, device=CPU).state_dict().items():
        if name in state:
            assert torch.equal(tensor, state[name]), name
    with torch.no_grad():
        ours = load_source(source, device=CPU, dtype=torch.float32)(sample()).logits
        torch.testing.assert_close(ours, theirs.float()(sample()).logits, rtol=1e-4, atol=1e-4)


def test_mxfp4_source_runs_as_transformers_dequantizes_it(mxfp4: Path) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    theirs: Any = AutoModelForCausalLM.from_pretrained(
        mxfp4,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
        experts_implementation="eager",
    ).eval()
    values = open_source(mxfp4)
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            path = f"model.layers.{layer}.mlp.experts.{name}"
            assert torch.equal(values.get(path), theirs.get_parameter(path)), path
    with torch.no_grad():
        expected = theirs.float()(sample()).logits
        for load in (load_source, load_checkpoint):
            ours = load(mxfp4, device=CPU, dtype=torch.float32)(sample()).logits
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_scales_that_do_not_fit_are_refused(tiny: Tiny, fp8: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    for case, change in {
        "absent": lambda tensors: tensors.pop(name),
        "misshapen": lambda tensors: tensors.update({name: torch.ones(3, 1)}),
        "left": lambda tensors: tensors.update({"model.norm.weight_scale_inv": torch.ones(1, 1)}),
    }.items():
        broken = tmp_path / case
        shutil.copytree(fp8, broken)
        tensors = load_file(broken / "model.safetensors")
        change(tensors)
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(ToolchainError) as caught:
            read_model(str(broken))
        assert caught.value.code == "TC-023"
    plain = tmp_path / "plain"
    shutil.copytree(tiny("deepseek_v3"), plain)
    shutil.copy(fp8 / "config.json", plain)
    with pytest.raises(ToolchainError, match="no tensor is stored so"):
        read_model(str(plain))


def test_other_methods_are_refused_at_plan_time(tiny: Tiny, tmp_path: Path) -> None:
    for name, quantization in {
        "gptq": {"quant_method": "gptq", "bits": 4},
        "per_tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    }.items():
        shutil.copytree(tiny("qwen3_moe"), tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
        findings = make_plan(read_model(str(tmp_path / name)), format="nvfp4").findings
        assert [item.code for item in findings] == ["TC-141"]


def quantized(source: Path, format_name: str, output: Path, **options: Any) -> dict[str, Any]:
    manifest = quantize(plan_for(source, format_name, **options), output, device="cpu")
    verdict = audit(output, against=source)
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    return manifest


def nvfp4_values(reader: CheckpointReader, name: str) -> torch.Tensor:
    """[E, in, out] by the definition of NVFP4 in ModelOpt's fused layout."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed = reader.get(name).transpose(1, 2)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    scale = reader.get(f"{name}_weight_scale").float().transpose(1, 2).repeat_interleave(16, dim=-1)
    return (
        (values[codes.int()] * scale * reader.get(f"{name}_weight_scale_2"))
        .to(torch.bfloat16)
        .transpose(1, 2)
    )


@pytest.mark.parametrize("format_name", ["nvfp4", "w4a16_nvfp4"])
def test_mxfp4_is_cast_to_nvfp4_without_a_changed_bit(mxfp4: Path, tmp_path: Path, format_name: str) -> None:
    manifest = quantized(mxfp4, format_name, tmp_path / "out", policy="experts-only")
    ours, source = CheckpointReader(tmp_path / "out"), open_source(mxfp4)
    for name in [name for name in source.infos if name.endswith(("gate_up_proj", "down_proj"))]:
        left, right = nvfp4_values(ours, name).contiguous(), source.get(name)
        assert torch.equal(left.view(torch.int16), right.view(torch.int16)), name
        entry = manifest["source_numbers"]["cast"][name]
        assert entry["requantized_blocks"] == 0 and entry["blocks"] == right.numel() // 32
    loaded = load_checkpoint(tmp_path / "out", device=CPU, dtype=torch.float32, emulate_activations=False)
    with torch.no_grad():
        assert torch.equal(
            loaded(sample()).logits, load_source(mxfp4, device=CPU, dtype=torch.float32)(sample()).logits
        )


def test_blocks_beyond_the_reach_of_e4m3_are_rounded_again_and_counted(mxfp4: Path, tmp_path: Path) -> None:
    """One block 2^18 above the smallest: 17 powers of two are what E4M3 spans."""
    from safetensors.torch import load_file, save_file

    source = tmp_path / "wide"
    shutil.copytree(mxfp4, source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    scales = tensors[f"{name}_scales"]
    low = int(scales.min())
    scales[1, 0, 0], scales[1, 0, 1] = low + 17, low + 18
    used = scales == low
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    manifest = quantized(source, "nvfp4", tmp_path / "out", policy="experts-only")
    entry = manifest["source_numbers"]["cast"][name]
    assert entry["requantized_blocks"] == int(used.sum())
    left = nvfp4_values(CheckpointReader(tmp_path / "out"), name)
    right = open_source(source).get(name)
    exact = ~used.repeat_interleave(32, dim=-1).transpose(1, 2)
    assert torch.equal(left[exact], right[exact])
    # Its scale becomes 2^(low + 1): codes 0 .. 6 are 0 .. 3 there, where steps are 0.5 and 1.
    assert (left - right).abs().max() <= 2.0 ** (low - 127)


def test_mxfp4_to_mxfp4_copies_every_byte(mxfp4: Path, tmp_path: Path) -> None:
    manifest = quantized(mxfp4, "mxfp4", tmp_path / "out")
    before, after = CheckpointReader(mxfp4), CheckpointReader(tmp_path / "out")
    assert set(before.infos) == set(after.infos)
    assert all(torch.equal(before.get(name), after.get(name)) for name in before.infos)
    assert manifest["source_numbers"]["copied"] == 2 * 4 * 3
    configs = [json.loads((path / "config.json").read_text()) for path in (mxfp4, tmp_path / "out")]
    assert configs[0] == configs[1]
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_fp8_to_fp8_block_copies_every_byte(fp8: Path, tmp_path: Path) -> None:
    quantized(fp8, "fp8_block", tmp_path / "out", policy="all-linear")
    before, after = CheckpointReader(fp8), CheckpointReader(tmp_path / "out")
    assert set(before.infos) == set(after.infos)
    for name in before.infos:
        assert torch.equal(before.get(name).view(torch.uint8), after.get(name).view(torch.uint8)), name


def test_what_the_policy_keeps_of_an_fp8_source_is_written_in_bf16(fp8: Path, tmp_path: Path) -> None:
    plan = plan_for(fp8, "nvfp4", policy="experts-only")
    assert [item.code for item in plan.findings if item.severity == "warning"] == ["TC-145"]
    quantized(fp8, "nvfp4", tmp_path / "out", policy="experts-only")
    stored, after = CheckpointReader(fp8), CheckpointReader(tmp_path / "out")
    kept = [name for name in stored.infos if stored.infos[name].dtype == "F8_E4M3" and "self_attn" in name]
    for name in kept:
        assert torch.equal(after.get(name), published_fp8(stored, name)), name
    assert not [name for name in after.infos if name.endswith("_scale_inv")]


def test_gpt_oss_in_bf16_becomes_what_is_published(tiny: Tiny, tmp_path: Path) -> None:
    """The layout that transformers reads back by itself."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    source, output = tiny("gpt_oss"), tmp_path / "out"
    quantized(source, "mxfp4", output)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        output, quantization_config=Mxfp4Config(dequantize=True), experts_implementation="eager"
    ).eval()
    plain = CheckpointReader(source)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    error = (theirs.get_parameter(name).float() - plain.get(name).float()).norm() / plain.get(
        name
    ).float().norm()
    assert 0 < error < 0.2
    with torch.no_grad():
        ours = load_checkpoint(output, device=CPU, dtype=torch.float32)(sample()).logits
        torch.testing.assert_close(ours, theirs.float()(sample()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"policy": "all-linear"}, "attention"), ({"kv_cache": "fp8"}, "KV cache fp8")],
)
def test_what_the_published_layout_cannot_say_is_refused(
    tiny: Tiny, options: dict[str, str], said: str
) -> None:
    findings = make_plan(read_model(str(tiny("gpt_oss"))), format="mxfp4", **options).findings
    assert [said in item.message for item in findings if item.code == "TC-140"] == [True]


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_formats_without_a_place_in_fused_storage_are_refused(tiny: Tiny, kind: str) -> None:
    info = read_model(str(tiny(kind)))
    for format_name in ("int4_awq", "w4a8_awq", "int8_sq", "fp8_block", "mxfp8"):
        findings = [item for item in make_plan(info, format=format_name).findings if item.code == "TC-140"]
        assert any("one tensor" in item.message and "--format" in item.where for item in findings), (
            format_name
        )
