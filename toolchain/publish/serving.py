"""How a published engine is served: command lines for each runtime that reads it, or why one does not."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from toolchain.deploy.loads import TITLES
from toolchain.deploy.serving import Checkpoint, peer_command
from toolchain.publish.release import Release


@dataclass(frozen=True, kw_only=True)
class Serving:
    runtime: str
    commands: str
    """A shell script; empty where the runtime does not read the checkpoint."""
    notes: tuple[str, ...] = ()


def servings(release: Release, repo_id: str, algos: frozenset[str]) -> list[Serving]:
    """``algos``: quant_algo of every format that some part has."""
    peers = [_peer(runtime, release, repo_id, algos) for runtime in ("vllm", "sglang")]
    return [_tensorrt_llm(release, repo_id), *peers, _triton(release, repo_id)]


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


def _peer(runtime: str, release: Release, repo_id: str, algos: frozenset[str]) -> Serving:
    """vLLM or SGLang, from the hub id."""
    manifest = release.manifest
    parallel, limits = manifest.get("parallel", {}), manifest.get("limits", {})
    checkpoint = Checkpoint(
        model=repo_id,
        name=release.name,
        architecture=str(manifest["model"].get("architecture", "")),
        quant_algo=str(manifest.get("quant_algo")),
        algos=algos,
        kv_cache=str(manifest.get("kv_cache", "none")),
        is_moe=release.is_moe,
        tp=parallel.get("tp", 1),
        ep=parallel.get("ep", 1),
        pp=parallel.get("pp", 1),
        max_batch_size=limits.get("max_batch_size"),
        max_seq_len=limits.get("max_seq_len"),
    )
    command = peer_command(runtime, checkpoint)
    notes = (command.refused,) if command.refused else command.notes
    return Serving(runtime=TITLES[runtime], commands=command.text, notes=notes)


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
