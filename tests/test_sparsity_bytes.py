"""The written bytes of sparse checkpoints: every way of making them is the same, and a broken group is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.planning import plan_for
from tests.test_sparsity import sparse
from toolchain.checkpoint.audit import audit
from toolchain.core.progress import Silent
from toolchain.quantize.job import quantize

Tiny = Callable[[str], Path]
SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """``made(kind, format)``: a sparse checkpoint. Read only."""
    found: dict[tuple[str, str], Path] = {}

    def make(kind: str, format: str) -> Path:
        if (kind, format) not in found:
            output = tmp_path_factory.mktemp("sparse") / "out"
            policy = "experts-only" if kind == "gpt_oss" else "all-linear"
            quantize(sparse(plan_for(tiny(kind), format, policy=policy)), output, device="cpu")
            found[kind, format] = output
        return found[kind, format]

    return make


@pytest.mark.parametrize(("format", "options"), [("w4a16_nvfp4", {}), ("int8_wo", {}), ("fp8", {})])
def test_streamed_bytes_are_the_same(
    tiny: Tiny, tmp_path: Path, format: str, options: dict[str, Any]
) -> None:
    """Without data, tensor by tensor, and with data, layer by layer, as with the model in memory."""
    plan = sparse(plan_for(tiny("qwen3_moe"), format, policy="all-linear", **options))
    memory = quantize(plan, tmp_path / "memory", stream=False, device="cpu")
    streamed = quantize(plan, tmp_path / "streamed", stream=True, device="cpu")
    assert streamed["streamed"] == ("layers" if format == "fp8" else "data-free")
    assert (tmp_path / "memory" / SHARD).read_bytes() == (tmp_path / "streamed" / SHARD).read_bytes()
    assert audit(tmp_path / "streamed").facts["sparsity"]["share"] == 1.0
    if format == "fp8":
        assert streamed["sparsity"] == memory["sparsity"]


def test_streamed_fused_experts_are_sparse(tiny: Tiny, tmp_path: Path) -> None:
    plan = sparse(plan_for(tiny("gpt_oss"), "mxfp4", policy="experts-only"))
    quantize(plan, tmp_path / "memory", stream=False, device="cpu")
    quantize(plan, tmp_path / "streamed", stream=True, device="cpu")
    assert (tmp_path / "memory" / SHARD).read_bytes() == (tmp_path / "streamed" / SHARD).read_bytes()


def fill_zero(codes: torch.Tensor, format: str, *, fused: bool) -> None:
    """Put a number into the first group's third place that is zero: every format has one at least there."""
    raw = codes.view(torch.uint8)
    if fused:  # [E, in/2, out]: two inputs in a byte, the group is two bytes of one column
        raw[0, 0, 0], raw[0, 1, 0] = 0x11, raw[0, 1, 0] | 0x11
    elif format in ("nvfp4",):
        raw[0, 0], raw[0, 1] = 0x11, raw[0, 1] | 0x11
    elif format == "int4_awq":  # row 1 is the high nibble of the first row of bytes
        raw[0, :4] |= 0x10
    else:
        raw[0, :3] = 1


@pytest.mark.parametrize(
    ("kind", "format", "name"),
    [
        ("qwen3_moe", "fp8", "model.layers.1.mlp.experts.2.up_proj.weight"),
        ("qwen3_moe", "int8_wo", "model.layers.0.self_attn.o_proj.weight"),
        ("qwen3_moe", "nvfp4", "model.layers.1.mlp.experts.3.down_proj.weight"),
        ("qwen3_moe", "int4_awq", "model.layers.0.mlp.experts.0.gate_proj.weight"),
        ("gpt_oss", "nvfp4", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_a_broken_group_is_found(
    made: Callable[[str, str], Path], tmp_path: Path, kind: str, format: str, name: str
) -> None:
    directory = shutil.copytree(made(kind, format), tmp_path / "out")
    tensors = load_file(directory / SHARD)
    fill_zero(tensors[name], format, fused=kind == "gpt_oss")
    save_file(tensors, directory / SHARD, {"format": "pt"})
    (found,) = [item for item in audit(directory).findings if item.code == "TC-262"]
    assert found.severity == "error"
    # Experts that are stored together are matrices of their own.
    assert found.where == name.removesuffix(".weight").replace("experts.down", "experts.0.down")
    assert ": 1 of " in found.message


def test_the_checkpoint_itself_says_that_it_is_sparse(
    made: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """plan.json or quantize.json beside the bytes is enough; without both nothing was promised."""
    directory = shutil.copytree(made("qwen3_moe", "fp8"), tmp_path / "out")
    assert json.loads((directory / "quantize.json").read_text())["sparsity"]["pattern"] == "2:4"
    (directory / "plan.json").unlink()
    assert audit(directory).facts["sparsity"]["share"] == 1.0
    (directory / "quantize.json").unlink()
    assert "sparsity" not in audit(directory).facts


def test_another_choice_of_zeros_is_not_the_source_pruned(
    made: Callable[[str, str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    """``--against`` knows which two of four must stay: a checkpoint that kept the smallest is another matrix."""
    directory = shutil.copytree(made("qwen3_moe", "fp8"), tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(directory / SHARD)
    source = load_file(tiny("qwen3_moe") / SHARD)[name].float()
    scale = tensors[name.replace("weight", "weight_scale")]
    groups = source.unflatten(-1, (-1, 4))
    small = groups.abs().argsort(-1)[..., :2]
    kept = torch.zeros_like(groups).scatter(-1, small, groups.gather(-1, small)).flatten(-2)
    tensors[name] = (kept / scale).to(torch.float8_e4m3fn)
    save_file(tensors, directory / SHARD, {"format": "pt"})
    codes = {item.code for item in audit(directory, against=tiny("qwen3_moe"), progress=Silent()).findings}
    assert codes == {"TC-348"}


def test_verify_prints_the_count(toolchain: Any, made: Callable[[str, str], Path]) -> None:
    ran = toolchain("verify", made("qwen3_moe", "fp8"))
    assert ran.status == 0 and "122,880 of 122,880 groups (100.00%) of 32 matrices" in ran.out


@pytest.mark.parametrize("format", ["fp8", "int8_sq"])
def test_rank_files_of_trtllm_build_keep_the_groups(tiny: Tiny, tmp_path: Path, format: str) -> None:
    """Fused, cut over two ranks and renamed: TensorRT looks at these matrices, four along the input."""
    from toolchain.build.tensorrt import Parallel, write_legacy_checkpoint

    quantize(sparse(plan_for(tiny("llama"), format)), tmp_path / "out", device="cpu")
    parallel = Parallel(tp=2, pp=1, ep=1)
    write_legacy_checkpoint(tmp_path / "out", tmp_path / "ranks", parallel, force=True, progress=Silent())
    seen = 0
    for rank in range(2):
        for name, tensor in load_file(tmp_path / "ranks" / f"rank{rank}.safetensors").items():
            if tensor.dtype in (torch.float8_e4m3fn, torch.int8) and tensor.dim() == 2:
                kept = (tensor.float() != 0).unflatten(-1, (-1, 4)).sum(-1)
                assert kept.max() <= 2, name
                seen += 1
    assert seen == 2 * 2 * 5  # ranks, layers, and qkv, dense, fc, gate and proj
