"""Engine directories as a finished pipeline leaves them, for tests of publishing: hand-made documents, small files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CALIBRATION = b'{"text": "calibrated on this"}\n'
METRICS: dict[str, Any] = {
    "schema_version": 2,
    "measured": True,
    "emulation": "target",
    "data": {
        "source": "/home/somebody/held-out.jsonl",
        "tokens": 4096,
        "token_hash": "ab" * 32,
        "window": 512,
        "stride": 512,
        "bos": False,
        "calibration_overlap": 0.0,
    },
    "tokens": 4088,
    "ppl": 8.125,
    "nll": 2.0949,
    "intervals": {"ppl": [7.9, 8.4], "kl_mean": [0.011, 0.015]},
    "baseline_ppl": 8.0,
    "ppl_increase": 0.015625,
    "kl_mean": 0.0125,
    "kl_median": 0.004,
    "kl_p99": 0.11,
    "top1_agreement": 0.9375,
    "top5_agreement": 0.91,
    "router_agreement": 0.975,
    "fit": True,
    "gates": [{"gate": "max_kl", "limit": 0.02, "value": 0.0125, "passed": True}],
}


def assignment(role: str, layer: int | None, format_name: str, parameters: int) -> dict[str, Any]:
    return {
        "role": role,
        "layer": layer,
        "format": format_name,
        "reason": "",
        "source": "",
        "modules": 1,
        "parameters": parameters,
        "source_bytes": 2 * parameters,
        "planned_bytes": parameters // 2 if format_name != "source" else 2 * parameters,
        "projections": [],
    }


def make_release(
    root: Path,
    *,
    quant_algo: str = "NVFP4",
    formats: tuple[str, ...] = ("nvfp4",),
    target: str = "local",
    model: str = "someone/Base-MoE",
    metrics: dict[str, Any] | None = METRICS,
    passed: bool = True,
    **changes: Any,
) -> Path:
    """An engine directory below ``root``; ``changes`` replace entries of engine.json."""
    engine = root / "base-moe-nvfp4"
    checkpoint = engine / "checkpoint"
    checkpoint.mkdir(parents=True)
    contents = {
        "config.json": json.dumps({"architectures": ["Qwen3MoeForCausalLM"]}).encode(),
        "hf_quant_config.json": json.dumps({"quantization": {"quant_algo": quant_algo}}).encode(),
        "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
        "model-00002-of-00002.safetensors": bytes(range(255, -1, -1)) * 30,
        "tokenizer.json": b"{}",
    }
    calibration = {"source": "/home/somebody/calib.jsonl", "samples": 64, "length_tokens": 512, "seed": 3}
    quantization = {"calibration": calibration | {"tokens_sha256": "cd" * 32}, "starved_experts": []}
    contents["quantize.json"] = json.dumps(quantization).encode()
    for name, data in contents.items():
        (checkpoint / name).write_bytes(data)
    plan = {
        "model": model,
        "format": formats[0],
        "recipe": "mse+gptq",
        "assignments": [
            assignment("routed_expert", 0, "source", 1000),
            assignment("routed_expert", 1, formats[0], 6000),
            assignment("routed_expert", 2, formats[0], 6000),
            assignment("attention", 0, "source", 500),
            assignment("attention", 1, formats[-1] if len(formats) > 1 else "source", 500),
            assignment("lm_head", None, "source", 2000),
        ],
        "estimates": {
            "source_bytes": 32000,
            "checkpoint_bytes": 14000,
            "effective_bits": 7.0,
            "parameters": 16000,
            "active_parameters": 4000,
        },
    }
    documents = {"plan.json": plan, "verify.json": {"passed": passed, "facts": {}, "findings": []}}
    if metrics is not None:
        documents["metrics.json"] = metrics
    for name, value in documents.items():
        (engine / name).write_text(json.dumps(value))
    if target == "trtllm":
        (engine / "llm_args.yaml").write_text("backend: pytorch\ntensor_parallel_size: 2\n")
        (engine / "versions.lock.json").write_text("{}")
    manifest = {
        "schema_version": 1,
        "name": engine.name,
        "format": formats[0],
        "formats": list(formats),
        "quant_algo": quant_algo,
        "kv_cache": "fp8",
        "policy": "experts-only",
        "target": target,
        "target_version": "1.2.1" if target == "trtllm" else "0.1.0",
        "gpu": "b200" if target == "trtllm" else "cpu",
        "model": {"source": model, "architecture": "Qwen3MoeForCausalLM", "identity": "ef" * 32},
        "checkpoint": "checkpoint",
        "limits": {"max_batch_size": 8, "max_seq_len": 4096, "max_num_tokens": 8192},
        "parallel": {"tp": 2, "ep": 2, "pp": 1},
        "metrics": metrics or {"measured": False},
        "inputs": {
            "model": {"model.safetensors": "12" * 32, "config.json": "34" * 32},
            "calibration": hashlib.sha256(CALIBRATION).hexdigest(),
            "evaluation": None,
        },
        "stages": {},
        "command": ["toolchain", "engine", "/home/somebody/base", "--format", "nvfp4"],
        "versions": {"python": "3.11.7", "toolchain": "0.0.1", "torch": "9.9.9"},
        "git_commit": "0123456789abcdef",
        "created": "2026-11-20T10:00:00+00:00",
        "files": {f"checkpoint/{name}": hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        **changes,
    }
    (engine / "engine.json").write_text(json.dumps(manifest))
    return engine
