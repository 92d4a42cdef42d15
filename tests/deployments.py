"""Engine directories for tests of deployment: real file names, sizes that matter, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_engine(
    directory: Path,
    *,
    target: str = "trtllm",
    formats: tuple[str, ...] = ("nvfp4",),
    quant_algo: str = "NVFP4",
    kv_cache: str = "fp8",
    tp: int = 1,
    ep: int = 1,
    pp: int = 1,
    gpu: str = "b200",
    architecture: str = "Qwen3MoeForCausalLM",
    moe: bool = True,
    version: str = "1.2.1",
    shard_bytes: int = 1000,
) -> Path:
    """An engine as `toolchain engine` leaves it, as far as a deployment looks; its shard is sparse."""
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "hf_quant_config.json", *TOKENIZER):
        (checkpoint / name).write_text("{}")
    with (checkpoint / "model.safetensors").open("wb") as handle:
        handle.truncate(shard_bytes)
    for name in ("quantize.json", "plan.json", ".lock"):
        (checkpoint / name).write_text("{}")
    role = "routed_expert" if moe else "mlp"
    (directory / "plan.json").write_text(json.dumps({"assignments": [{"role": role}]}))
    manifest: dict[str, Any] = {
        "name": directory.name,
        "format": formats[0],
        "formats": list(formats),
        "quant_algo": quant_algo,
        "kv_cache": kv_cache,
        "target": target,
        "target_version": version,
        "gpu": gpu,
        "model": {"architecture": architecture},
        "checkpoint": "checkpoint",
        "limits": {"max_batch_size": 64, "max_seq_len": 8192},
        "parallel": {"tp": tp, "ep": ep, "pp": pp},
    }
    (directory / "engine.json").write_text(json.dumps(manifest))
    if target != "local":
        lock = {"tensorrt_llm": version, "image": f"release:{version}", "world_size": tp * pp}
        (directory / "versions.lock.json").write_text(json.dumps(lock))
    if target == "trtllm":
        (directory / "llm_args.yaml").write_text("backend: pytorch\n")
    if target == "tensorrt":
        (directory / "engine").mkdir()
        built = {"version": version, "pretrained_config": {"mapping": {"world_size": tp * pp}}}
        (directory / "engine" / "config.json").write_text(json.dumps(built))
        for rank in range(tp * pp):
            (directory / "engine" / f"rank{rank}.engine").touch()
    return directory
