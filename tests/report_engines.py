"""Engine directories for tests of the report: what stages write, with plausible numbers, and no tensor."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

SHA = "6f1c58308e49d88f4f7bc7ee0bcb89cab169cb2add81ef1ce8c0bffcdcf34daf"
TOKENS = "315f28e34fe4b06f1f1b4ddbd7cfdd39c1b835afdc7ca6ab190ea2f9168bf400"
EXPERT_BITS = {"nvfp4": 4.5, "fp8": 8.0, "int4_awq": 4.125}


def make_engine(
    directory: Path,
    *,
    format: str = "nvfp4",
    layers: int = 4,
    experts: int = 8,
    kl: float = 0.0048,
    seed: int = 0,
    bench: bool = True,
    sensitivity: bool = True,
    training: bool = False,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Every file that a report reads. ``experts=0``: a dense model. ``changes``: keys of metrics.json to replace."""
    draw = random.Random(seed)
    plan = make_plan(format, layers, experts)
    metrics = {**make_metrics(draw, layers, experts, kl), **(changes or {})}
    files: dict[str, Any] = {
        "plan.json": plan,
        "metrics.json": metrics,
        "verify.json": make_audit(plan),
        "checkpoint/quantize.json": make_manifest(plan),
        "engine.json": make_engine_json(directory.name, plan),
    }
    if training:
        files["checkpoint/quantize.json"] |= {"training": make_training()}
    if experts:
        files["checkpoint/coverage.json"] = make_coverage(draw, layers, experts)
    if sensitivity:
        files["sensitivity.json"] = make_sensitivity(draw, plan)
    if bench:
        files["bench/20261121T104129Z.json"] = make_bench([1, 4, 16])
        files["bench/source/before.json"] = make_bench([1, 4, 16])
    for name, value in files.items():
        write(directory / name, value)
    return directory


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def change(path: Path, **keys: Any) -> None:
    """Replace keys of a document; None removes one."""
    value = {**json.loads(path.read_text()), **keys}
    write(path, {key: item for key, item in value.items() if item is not None})


def make_plan(format: str, layers: int, experts: int) -> dict[str, Any]:
    role = "routed_expert" if experts else "dense_mlp"
    parameters = 3 * 2048 * 768 * max(experts, 8)
    assignments = []
    for layer in range(layers):
        chosen = format if layer else "source"
        bits = EXPERT_BITS.get(chosen, 16)
        assignments.append(part(role, layer, chosen, parameters, bits, f"policy says {chosen}"))
        assignments.append(part("attention", layer, "source", 4 * 2048 * 2048, 16, "attention is left out"))
    for role, count in (("router", 2048 * experts), ("norm", 4096), ("embedding", 2**26), ("lm_head", 2**26)):
        if count:
            assignments.append(part(role, None, "source", count, 16, "keeps the source dtype"))
    source = sum(item["source_bytes"] for item in assignments)
    planned = sum(item["planned_bytes"] for item in assignments)
    total = sum(item["parameters"] for item in assignments)
    quantized = sum(item["parameters"] for item in assignments if item["format"] != "source")
    return {
        "model": "Qwen/Qwen3-30B-A3B", "architecture": "Qwen3MoeForCausalLM", "model_identity": SHA, "format": format,
        "policy": "experts-only", "recipe": "best", "kv_cache": "fp8", "gpu": "b200", "target": "trtllm",
        "target_version": "1.2.1", "assignments": assignments, "schema_version": 1,
        "estimates": {
            "parameters": total, "quantized_parameters": quantized, "source_bytes": source,
            "checkpoint_bytes": planned, "effective_bits": planned * 8 / total, "weights_per_gpu_bytes": planned,
            "kv_cache_per_gpu_bytes": 2**33, "activations_per_gpu_bytes": 2**30, "gpu_memory_bytes": 180 * 2**30,
            "quantize_memory_bytes": 2 * source, "quantize_seconds": 61.0, "basis": "measured on two threads",
        },
    }  # fmt: skip


def part(role: str, layer: int | None, format: str, count: int, bits: float, reason: str) -> dict[str, Any]:
    return {
        "role": role, "layer": layer, "format": format, "reason": reason, "modules": 4, "parameters": count,
        "source_bytes": 2 * count, "planned_bytes": int(count * bits / 8), "projections": [],
    }  # fmt: skip


def make_metrics(draw: random.Random, layers: int, experts: int, kl: float) -> dict[str, Any]:
    """Contract of the evaluation, schema 2."""
    ppl, tokens = 8.412, 98_304
    by_layer = [layer_metrics(draw, index, layers, experts) for index in range(layers)]
    routers = [item["router_agreement"] for item in by_layer] if experts else []
    figures = {
        "ppl": ppl * (1 + kl / 2), "kl_mean": kl, "kl_median": kl * 0.66, "kl_p99": kl * 5.3,
        "reverse_kl_mean": kl * 1.04, "top1_agreement": 1 - 4 * math.sqrt(kl) / 4,
    }  # fmt: skip
    return {
        "schema_version": 2, "measured": True, "checkpoint": "engines/x/checkpoint", "baseline": "Qwen/Qwen3-30B-A3B",
        "emulation": "target", "tokens": tokens - 192, "nll": math.log(figures["ppl"]), "baseline_ppl": ppl,
        "data": {"source": "held-out.jsonl", "tokens": tokens, "token_hash": TOKENS, "window": 512, "stride": 512,
                 "bos": False, "calibration_overlap": 0.0},
        **figures, "ppl_increase": kl / 2, "reverse_kl_median": kl * 0.67, "reverse_kl_p99": kl * 5.5,
        "top5_agreement": 0.961,
        "intervals": {"ppl": [figures["ppl"] * 0.985, figures["ppl"] * 1.016], "kl_mean": [kl * 0.94, kl * 1.07],
                      "top1_agreement": [figures["top1_agreement"] - 0.004, figures["top1_agreement"] + 0.004]},
        "router_agreement": sum(routers) / layers if routers else None,
        "router_agreement_by_layer": routers, "router_set_agreement": 0.942 if experts else None,
        "router_weighted_agreement": 0.987 if experts else None,
        "kl_histogram": histogram(draw, kl, tokens), "layers": by_layer,
        "variants": {"target": figures, "weights": {**figures, "kl_mean": kl * 0.7, "ppl": ppl * 1.001},
                     "kv_none": {**figures, "kl_mean": kl * 0.9}},
        "generations": [
            {"prompt": "def factorial(n):", "baseline": "\n    if n == 0:\n        return 1\n    return n * f(n - 1)\n",
             "quantized": "\n    if n <= 1:\n        return 1\n    return n * f(n - 1)\n", "tokens": 48,
             "first_difference": 4},
            {"prompt": "The capital of France is", "baseline": " Paris.", "quantized": " Paris.", "tokens": 3,
             "first_difference": None},
        ],
        "gates": [{"gate": "max_kl", "limit": 0.01, "value": kl, "passed": kl <= 0.01},
                  {"gate": "min_top1", "limit": 0.9, "value": figures["top1_agreement"],
                   "passed": figures["top1_agreement"] >= 0.9}],
        "fit": kl <= 0.01 and figures["top1_agreement"] >= 0.9,
        "tasks": {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.8131, "acc_stderr,none": 0.008}}},
    }  # fmt: skip


def layer_metrics(draw: random.Random, layer: int, layers: int, experts: int) -> dict[str, Any]:
    depth = (layer + 1) / layers
    found: dict[str, Any] = {"layer": layer, "hidden_rms": 0.008 + 0.035 * depth + draw.random() * 0.004}
    if not experts:
        return found
    before = shares(draw, experts)
    moved = [value * (1 + draw.gauss(0, 0.01 + 0.03 * depth)) for value in before]
    after = [value / sum(moved) for value in moved]
    agreement = 1 - 0.002 - 0.03 * depth - draw.random() * 0.005
    return {
        **found, "router_agreement": agreement, "router_set_agreement": agreement**4,
        "router_weighted_agreement": agreement + 0.3 * (1 - agreement),
        "load_shift": sum(abs(new - old) for new, old in zip(after, before, strict=True)) / 2,
        "load": after, "baseline_load": before,
    }  # fmt: skip


def shares(draw: random.Random, experts: int) -> list[float]:
    weights = [math.exp(draw.gauss(0, 0.9)) for _ in range(experts)]
    return [weight / sum(weights) for weight in weights]


def histogram(draw: random.Random, kl: float, tokens: int, bins: int = 60) -> dict[str, Any]:
    edges = [10 ** (-8 + index * 9 / bins) for index in range(bins + 1)]
    counts = [0] * bins
    for _ in range(4000):
        place = (math.log10(kl * 0.6) + draw.gauss(0, 0.5) + 8) / 9 * bins
        counts[min(max(int(place), 0), bins - 1)] += tokens // 4000
    return {"edges": edges, "counts": counts}


def make_audit(plan: dict[str, Any]) -> dict[str, Any]:
    estimates = plan["estimates"]
    facts = {
        "quant_algo": plan["format"].upper(), "family": "qwen3_moe", "tensors": 55_000, "quantized_modules": 18_000,
        "bytes": estimates["checkpoint_bytes"], "effective_bits": estimates["effective_bits"],
    }  # fmt: skip
    finding = {
        "code": "TC-316",
        "where": "model.layers.1",
        "message": "found 2, expected 1",
        "severity": "warning",
    }
    return {"directory": "engines/x/checkpoint", "passed": True, "facts": facts, "findings": [finding]}


def make_manifest(plan: dict[str, Any]) -> dict[str, Any]:
    calibration = {
        "source": "chats.jsonl", "samples": 512, "length_tokens": 2048, "seed": 0, "template_sha256": SHA,
        "tokens_sha256": TOKENS,
    }  # fmt: skip
    return {
        "schema_version": 1, "format": plan["format"], "calibration": calibration,
        "seconds": {"load": 4.1, "calibrate": 51.0, "export": 9.0}, "peak_memory_bytes": 90 * 2**30,
        "tensor_bytes": plan["estimates"]["checkpoint_bytes"], "versions": {"python": "3.11.7", "toolchain": "0.1.0"},
    }  # fmt: skip


def make_training() -> dict[str, Any]:
    """The record of a distillation: it improves until step 150 of 200."""
    kls = {0: 0.0201, 50: 0.0122, 100: 0.0094, 150: 0.0089, 200: 0.0093}
    curve = [
        {"step": step, "ce": 2.1, "ppl": 8.2, "kl": kl, "top1": 0.95, "router": 0.97}
        for step, kl in kls.items()
    ]
    return {
        "schema_version": 1, "method": "qad", "teacher": "source", "steps": 200, "planned_steps": 400, "tokens": 819200,
        "stopped": "patience", "best_step": 150, "metric": "kl", "improved": True, "curve": curve,
        "held_out": {"before": curve[0], "best": curve[3], "after": curve[3]},
        "data": {"train_sha256": SHA, "held_out_sha256": TOKENS}, "seconds": {"steps": 3610.0},
        "settings": {"data": ["chats.jsonl"], "roles": [], "lora_rank": 0, "learning_rate": 1e-5},
    }  # fmt: skip


def make_engine_json(name: str, plan: dict[str, Any]) -> dict[str, Any]:
    stages = {
        "quantize": {"seconds": 64.1, "peak_memory_bytes": 90 * 2**30},
        "evaluate": {"seconds": 171.0, "peak_memory_bytes": 60 * 2**30},
    }
    return {
        "schema_version": 1, "name": name, "format": plan["format"], "stages": stages,
        "command": ["toolchain", "engine", plan["model"], "--format", plan["format"], "--calib-data", "my chats.jsonl"],
        "versions": {"python": "3.11.7", "toolchain": "0.1.0", "nvidia-modelopt": "0.47.0", "numpy": "2.4.6"},
        "git_commit": "8bb831243059", "created": "2026-11-21T11:07:13+00:00",
    }  # fmt: skip


def make_coverage(draw: random.Random, layers: int, experts: int, samples: int = 512) -> dict[str, Any]:
    total = samples * 2048 * min(8, experts)
    found = {}
    for layer in range(layers):
        tokens = [int(total * share) for share in shares(draw, experts)]
        if layer == layers - 1:
            tokens[-1] = 0
        found[f"model.layers.{layer}.mlp.experts"] = {"tokens": tokens, "samples": tokens, "seen": tokens}
    return {
        "mode": "routed", "sampling": "random", "min_tokens_per_expert": 32, "samples": samples, "length_tokens": 2048,
        "experts": layers * experts, "cv": 0.91, "starved": 1, "remedy": "largest range of the layer", "layers": found,
    }  # fmt: skip


def make_sensitivity(draw: random.Random, plan: dict[str, Any]) -> dict[str, Any]:
    scores = [
        {
            "group": f"{item['layer']}.{item['role']}", "role": item["role"], "layer": item["layer"],
            "format": plan["format"], "kl": (kl := math.exp(draw.gauss(-9, 0.8))), "kl_stderr": kl * 0.08,
            "bits_saved": 0.2, "kl_per_bit": kl / 0.2,
        }
        for item in plan["assignments"]
        if item["layer"] is not None
    ]  # fmt: skip
    return {
        "model": plan["model"],
        "policy": "all-linear",
        "held_out": {"windows": 8, "length_tokens": 512},
        "scores": scores,
    }


def make_bench(users: list[int], engine: str = "") -> dict[str, Any]:
    def times(scale: float) -> dict[str, float]:
        return {"p50": scale, "p90": scale * 1.2, "p99": scale * 1.7, "mean": scale * 1.05, "count": 32}

    levels = [
        {
            "concurrency": count, "requests": 32, "errors": 0, "ttft_ms": times(20 + 3 * count),
            "itl_ms": times(6 + count / 4), "tpot_ms": times(6.2 + count / 4), "e2e_ms": times(400 + 30 * count),
            "output_tokens_per_s": 140 * count**0.8, "requests_per_s": 2.2 * count**0.8,
        }
        for count in users
    ]  # fmt: skip
    return {
        "schema_version": 1, "created": "2026-11-21T10:41:38+00:00", "load": "closed loop, gRPC streaming",
        "settings": {"concurrency": users, "requests": 32, "prompt_tokens": 64, "output_tokens": 32, "seed": 0},
        "environment": {"cpu": "AMD EPYC", "cpu_cores": 2, "gpus": [],
                        "server": {"name": "triton", "version": "2.51.0"},
                        "engine": {"name": "x", "manifest_sha256": engine}},
        "levels": levels,
    }  # fmt: skip
