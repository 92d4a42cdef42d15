"""Sources that are already quantized: planned as the BF16 model, dequantized as published, cast where that is exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_fp8_source, make_mxfp4_source, make_tiny
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.checkpoint.source import open_source
from toolchain.core.errors import ToolchainError
from toolchain.modeling.loading import load_checkpoint, load_source
from toolchain.models.reader import read_model

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
    import shutil

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


def test_other_methods_are_refused_at_plan_time(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    from toolchain.plan.planner import make_plan

    for name, quantization in {
        "gptq": {"quant_method": "gptq", "bits": 4},
        "per_tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    }.items():
        shutil.copytree(tiny("qwen3_moe"), tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
        findings = make_plan(read_model(str(tmp_path / name)), format="nvfp4").findings
        assert [item.code for item in findings] == ["TC-141"]
