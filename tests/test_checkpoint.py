"""Checkpoint files in and out, against safetensors and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from toolchain.checkpoint.quant_config import (
    QuantConfig,
    parse_quant_config,
    render_flat,
    render_legacy,
    summarize_excluded,
)
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.checkpoint.writer import write_shards
from toolchain.core.errors import ToolchainError

Tiny = Callable[[str], Path]


def test_sharded_output_is_read_by_transformers(tiny: Tiny, tmp_path: Path) -> None:
    """Cut a plain model into many shards: names, index and total size as the hub has them."""
    import shutil

    from transformers import AutoModelForCausalLM

    source = tiny("mixtral")
    reader = CheckpointReader(source)
    total = write_shards(tmp_path, ((name, reader.get(name)) for name in reader.infos), shard_bytes=200_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == total == sum(info.bytes for info in reader.infos.values())
    assert set(index["weight_map"]) == set(reader.infos) and set(index["weight_map"].values()) == set(files)
    shutil.copy(source / "config.json", tmp_path)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path, source))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_views_into_one_storage_are_written_apart(tmp_path: Path) -> None:
    fused = torch.arange(24.0).view(2, 3, 4)
    write_shards(tmp_path, [("a", fused[0]), ("b", fused[1].T)])
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.get("a"), fused[0]) and torch.equal(reader.get("b"), fused[1].T)
    with pytest.raises(ToolchainError, match="no tensor c"):
        reader.get("c")


def test_both_shapes_of_the_quantization_config_mean_the_same() -> None:
    config = QuantConfig(
        quant_algo="NVFP4",
        kv_cache_quant_algo="FP8",
        group_size=16,
        exclude_modules=("lm_head", "model.layers.0.self_attn*"),
        producer_version="0.47.0",
    )
    legacy = render_legacy(config)
    assert parse_quant_config(legacy, "file") == config
    flat = parse_quant_config(render_flat(legacy), "inline")
    assert (flat.quant_algo, flat.kv_cache_quant_algo) == ("NVFP4", "FP8")
    assert flat.exclude_modules == config.exclude_modules and flat.shape == "flat"
    assert flat.excludes("model.layers.0.self_attn.qkv_proj") and not flat.excludes(
        "model.layers.0.mlp.up_proj"
    )


def test_wildcards_cover_whole_blocks_and_nothing_quantized() -> None:
    """layers.1 must not cover layers.10, a block with one quantized module gets no wildcard."""
    unquantized = [
        "lm_head",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.10.mlp.gate",
        "model.layers.1.mlp.shared_expert.up_proj",
        "model.layers.1.mlp.shared_expert_gate",
    ]
    quantized = ["model.layers.10.mlp.experts.0.up_proj", "model.layers.1.mlp.experts.0.up_proj"]
    patterns = summarize_excluded(unquantized, quantized)
    config = QuantConfig(quant_algo="NVFP4", exclude_modules=patterns)
    assert all(config.excludes(name) for name in unquantized)
    assert not any(config.excludes(name) for name in quantized)
    assert "model.layers.1.self_attn*" in patterns and "model.layers.10.mlp.gate" in patterns
