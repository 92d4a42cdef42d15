"""Rank files against ModelOpt's own exporter of TensorRT-LLM checkpoints (deprecated, but the reference), which starts
from the calibrated model in memory and knows neither our code nor our checkpoint. It fails on Mixtral in transformers 5
(experts are not called w1 any more), and cannot divide experts by ep."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.planning import export, plan_for
from tests.tiny import make_tiny
from toolchain.build.tensorrt import Parallel, write_legacy_checkpoint
from toolchain.quantize.job import calibrate

WIDE = dict(hidden_size=512, num_attention_heads=8, intermediate_size=512)
TIES = 0.05
"""Share of FP8 codes of one tensor that may be neighbours: ModelOpt's exporter divides in bf16, so rounds twice."""
CASES = [
    ("llama", "llama", "fp8", "fp8", 2, 2), ("llama", "llama", "nvfp4", "none", 2, 1),
    ("llama", "llama", "int4_awq", "none", 4, 1), ("llama", "llama", "w4a8_awq", "none", 2, 1),
    ("llama", "llama", "int8_sq", "none", 2, 1), ("qwen3", "qwen", "fp8", "none", 2, 1),
    ("qwen3_moe", "qwen", "fp8", "none", 1, 1), ("qwen3_moe", "qwen", "fp8", "none", 2, 1),
    ("qwen2_moe", "qwen", "fp8", "none", 2, 1),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "decoder", "format", "kv", "tp", "pp"), CASES)
def test_rank_files_equal_those_of_modelopt(
    tmp_path: Path, kind: str, decoder: str, format: str, kv: str, tp: int, pp: int
) -> None:
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    source = make_tiny(kind, tmp_path / "model", **(WIDE if kind in ("llama", "qwen3") else {}))
    done = calibrate(plan_for(source, format, kv_cache=kv, policy="all-linear"), device="cpu")
    write_legacy_checkpoint(export(done, tmp_path / "unified"), tmp_path / "ours", Parallel(tp=tp, pp=pp))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_tensorrt_llm_checkpoint(
            done.model, decoder, torch.bfloat16, export_dir=tmp_path / "theirs",
            inference_tensor_parallel=tp, inference_pipeline_parallel=pp,
        )  # fmt: skip
    for rank in range(tp * pp):
        ours, theirs = (load_file(tmp_path / side / f"rank{rank}.safetensors") for side in ("ours", "theirs"))
        compare(ours, theirs)
    compare_configs(tmp_path / "ours" / "config.json", tmp_path / "theirs" / "config.json")


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and numbers, but for what the module says."""
    # Theirs has keys and values apart as well; TensorRT-LLM would take the larger of them.
    apart = {name for name in theirs if name.endswith((".k_cache_scaling_factor", ".v_cache_scaling_factor"))}
    assert set(theirs) - apart <= set(ours)
    for name in set(ours) - set(theirs):
        # TensorRT-LLM's classes have the factor as a parameter: without it such a checkpoint does not load.
        assert name.endswith("prequant_scaling_factor") and bool((ours[name] == 1).all()), name
    for name in set(theirs) - apart:
        mine, other = ours[name], theirs[name]
        assert mine.dtype == other.dtype, name
        if other.dim() == 0 or "mlp.fc.weights" in name or "mlp.proj.weights" in name:
            assert mine.numel() == other.numel(), name
            other = other.reshape(mine.shape)
        assert mine.shape == other.shape, name
        different = mine.float() != other.float()
        if mine.dtype == torch.float8_e4m3fn and name.endswith(".weight"):
            steps = (mine.view(torch.uint8).int() - other.view(torch.uint8).int()).abs()
            assert different.float().mean() < TIES and steps[different].le(1).all(), name
        else:
            assert not different.any(), name


def compare_configs(ours: Path, theirs: Path) -> None:
    mine, other = json.loads(ours.read_text()), json.loads(theirs.read_text())
    keys = (
        "architecture", "dtype", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size",
        "hidden_size", "intermediate_size", "norm_epsilon", "vocab_size", "max_position_embeddings", "hidden_act",
        "use_parallel_embedding", "embedding_sharding_dim", "position_embedding_type", "share_embedding_table",
    )  # fmt: skip
    assert {key: mine[key] for key in keys} == {key: other[key] for key in keys}
    assert mine["mapping"] | other["mapping"] == mine["mapping"]
    theirs_said: dict[str, Any] = {k: v for k, v in other["quantization"].items() if k != "exclude_modules"}
    assert {key: mine["quantization"][key] for key in theirs_said} == theirs_said
