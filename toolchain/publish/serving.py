"""How a published engine is served: command lines for each runtime that reads it, or why one does not."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from toolchain.publish.release import Release

VLLM_METHOD = {
    "FP8": "modelopt",
    "FP8_PER_CHANNEL_PER_TOKEN": "modelopt",
    "NVFP4": "modelopt_fp4",
    "W4A16_NVFP4": "modelopt_fp4",
    "MXFP8": "modelopt_mxfp8",
    "MIXED_PRECISION": "modelopt_mixed",
}
"""quant_algo -> ``--quantization`` of vLLM (``layers/quantization/modelopt.py``: its QUANT_ALGOS; mid-2026)."""
VLLM_MIXED = {"FP8", "NVFP4", "W4A16_NVFP4"}
"""What vLLM knows inside MIXED_PRECISION."""
VLLM_DENSE_ONLY = {"FP8_PER_CHANNEL_PER_TOKEN"}
"""vLLM's fused experts take FP8 under one static scale per tensor only (``ModelOptFp8MoEMethod``)."""
VLLM_KV = {"fp8": "fp8", "fp8_cast": "fp8"}
"""KV cache format -> ``--kv-cache-dtype``; others are left to what the checkpoint says."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    runtime: str
    commands: str
    """A shell script; empty where the runtime does not read the checkpoint."""
    notes: tuple[str, ...] = ()


def servings(release: Release, repo_id: str, algos: frozenset[str]) -> list[Serving]:
    """``algos``: quant_algo of every format that some part has."""
    return [_tensorrt_llm(release, repo_id), _vllm(release, repo_id, algos), _triton(release, repo_id)]


def _tensorrt_llm(release: Release, repo_id: str) -> Serving:
    manifest = release.manifest
    if manifest["target"] != "trtllm":
        words = ["trtllm-serve", repo_id, "--backend", "pytorch", *_sizes(release)]
        note = (
            "This engine was planned for the local runtime: `toolchain support --gpu GPU` tells whether TensorRT-LLM "
            "runs these formats on a GPU."
        )
        return Serving(runtime="TensorRT-LLM", commands=shlex.join(words), notes=(note,))
    lock = f"Planned for TensorRT-LLM {manifest['target_version']} on {manifest['gpu']}"
    script = [
        shlex.join(["hf", "download", repo_id, "--local-dir", release.name]),
        shlex.join(
            ["trtllm-serve", release.name, "--extra_llm_api_options", f"{release.name}/llm_args.yaml"]
        ),
    ]
    newer = "newer releases call the option `--config`; versions.lock.json names the image"
    return Serving(runtime="TensorRT-LLM", commands="\n".join(script), notes=(f"{lock}; {newer}.",))


def _sizes(release: Release) -> list[str]:
    limits, parallel = release.manifest.get("limits", {}), release.manifest.get("parallel", {})
    pairs = [
        ("--tp_size", parallel.get("tp")),
        ("--pp_size", parallel.get("pp")),
        ("--ep_size", parallel.get("ep") if parallel.get("ep", 1) > 1 else None),
        ("--max_batch_size", limits.get("max_batch_size")),
        ("--max_seq_len", limits.get("max_seq_len")),
    ]
    return [word for name, value in pairs if value for word in (name, str(value))]


def _vllm(release: Release, repo_id: str, algos: frozenset[str]) -> Serving:
    reason = _vllm_refuses(release, algos)
    if reason:
        return Serving(runtime="vLLM", commands="", notes=(reason,))
    manifest = release.manifest
    words = ["vllm", "serve", repo_id]
    if algos != {"W4A16_MXFP4"}:
        words += ["--quantization", VLLM_METHOD[manifest["quant_algo"]]]
    kv_cache = manifest.get("kv_cache", "none")
    if kv_cache in VLLM_KV:
        words += ["--kv-cache-dtype", VLLM_KV[kv_cache]]
    tp = manifest.get("parallel", {}).get("tp", 1)
    if tp > 1:
        words += ["--tensor-parallel-size", str(tp)]
    length = manifest.get("limits", {}).get("max_seq_len")
    if length:
        words += ["--max-model-len", str(length)]
    return Serving(runtime="vLLM", commands=shlex.join(words), notes=tuple(_vllm_notes(manifest, kv_cache)))


def _vllm_refuses(release: Release, algos: frozenset[str]) -> str:
    """Why vLLM does not read the checkpoint; empty when it does."""
    stored = str(release.manifest.get("quant_algo"))
    if algos == {"W4A16_MXFP4"}:
        gpt_oss = release.manifest["model"].get("architecture") == "GptOssForCausalLM"
        return "" if gpt_oss else "vLLM reads MXFP4 weights of gpt-oss only."
    unknown = algos - VLLM_MIXED if stored == "MIXED_PRECISION" else {stored} - VLLM_METHOD.keys()
    if unknown:
        return f"vLLM's reader of ModelOpt checkpoints does not know {', '.join(sorted(unknown))}."
    if release.is_moe and stored in VLLM_DENSE_ONLY:
        return f"vLLM runs {stored} in dense layers only, not in experts."
    return ""


def _vllm_notes(manifest: dict[str, object], kv_cache: str) -> list[str]:
    notes = ["Not measured here: the figures above are of the written bytes on the local runtime."]
    if "NVFP4" in str(manifest.get("quant_algo")) or manifest.get("quant_algo") == "MIXED_PRECISION":
        notes.append(
            "On GPUs without FP4 matmuls vLLM computes NVFP4 weights with 16-bit activations (Marlin), and says so."
        )
    if kv_cache == "nvfp4":
        notes.append("The KV cache is NVFP4: leave `--kv-cache-dtype auto`, and use a vLLM that reads it.")
    return notes


def _triton(release: Release, repo_id: str) -> Serving:
    """The Triton repository comes from an engine directory, and TensorRT-LLM's llmapi layout loads a checkpoint."""
    if release.manifest["target"] != "trtllm":
        script = [
            shlex.join(["hf", "download", repo_id, "--local-dir", f"checkpoints/{release.name}"]),
            shlex.join(["toolchain", "generate", f"checkpoints/{release.name}", "--prompt", "Hello"]),
        ]
        note = (
            "Triton serves engine directories: `toolchain build` makes one of the checkpoint, `toolchain serve` starts "
            "it."
        )
        return Serving(runtime="Triton and the local runtime", commands="\n".join(script), notes=(note,))
    script = [
        shlex.join(["hf", "download", repo_id, "--local-dir", f"checkpoints/{release.name}"]),
        shlex.join(["toolchain", "build", f"checkpoints/{release.name}", *_built_for(release)]),
        shlex.join(["toolchain", "triton", f"engines/{release.name}"]),
    ]
    return Serving(runtime="Triton", commands="\n".join(script), notes=("TensorRT-LLM's llmapi model.",))


def _built_for(release: Release) -> list[str]:
    gpu = str(release.manifest["gpu"])
    return ["--target", "trtllm", "--gpu", gpu, "--output", f"engines/{release.name}"]
