"""Hand-made engine directories for tests of rendering, serving and benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import yaml


def write_engine(directory: Path, *, target: str = "local", checkpoint: Path | None = None) -> Path:
    """An engine directory around ``checkpoint`` (linked), or around a config.json alone."""
    directory.mkdir(parents=True)
    if checkpoint is not None:
        (directory / "checkpoint").symlink_to(checkpoint, target_is_directory=True)
    else:
        (directory / "checkpoint").mkdir()
        (directory / "checkpoint" / "config.json").write_text("{}")
    manifest = {
        "schema_version": 1,
        "name": directory.name,
        "format": "fp8",
        "quant_algo": "FP8",
        "kv_cache": "source",
        "target": target,
        "gpu": "cpu",
        "checkpoint": "checkpoint",
        "limits": {"max_batch_size": 8, "max_seq_len": 512, "max_num_tokens": 4096},
        "parallel": {"tp": 1, "ep": 1, "pp": 1},
        "target_version": "1.2.1",
        "model": {},
    }
    (directory / "engine.json").write_text(json.dumps(manifest))
    if target == "trtllm":
        llm_args = {"backend": "pytorch", "tensor_parallel_size": 2, "kv_cache_config": {"dtype": "fp8"}}
        (directory / "llm_args.yaml").write_text(yaml.safe_dump(llm_args))
    return directory
