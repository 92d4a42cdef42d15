"""Assemble an engine directory: a verified checkpoint, what its target needs beside it, and engine.json last."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from toolchain.build.llmapi.files import FILES, remove_trtllm_files, write_trtllm_files
from toolchain.build.local import write_local_files
from toolchain.build.tensorrt.bundle import (
    remove_tensorrt_files,
    require_buildable,
    write_tensorrt_files,
)
from toolchain.build.trtllm import max_num_tokens
from toolchain.checkpoint.manifest import DIGEST, digest_of
from toolchain.checkpoint.quant_config import MIXED
from toolchain.core.environment import git_commit, package_versions
from toolchain.core.errors import UsageError
from toolchain.core.files import atomic_write_json, read_json
from toolchain.core.progress import Progress, Silent
from toolchain.core.roles import Role
from toolchain.families import FAMILIES, Family, get_family
from toolchain.formats import get_format
from toolchain.plan.types import Plan

SCHEMA_VERSION = 1
TARGET_FILES = FILES
"""What target ``trtllm`` wants."""


def write_target_files(
    directory: Path, plan: Plan, *, final: Path | None = None, progress: Progress | None = None
) -> list[Path]:
    """What ``plan.target`` wants beside the checkpoint; files of another target are removed.

    ``final``: where the bundle will be, when ``directory`` is its temporary place.
    """
    if plan.target == "tensorrt":
        require_buildable(plan)  # before anything of an earlier build goes
    remove_trtllm_files(directory)
    remove_tensorrt_files(directory)
    if plan.target == "local":
        return write_local_files(directory, plan, progress=progress or Silent())
    if plan.target == "tensorrt":
        return write_tensorrt_files(directory, plan, final=final, progress=progress or Silent())
    if plan.target != "trtllm":
        raise UsageError(
            f"no bundle can be built for target {plan.target!r}; local, trtllm and tensorrt can",
            hint="TensorRT-LLM's PyTorch backend (--target trtllm) loads the checkpoint without trtllm-build",
            code="TC-403",
        )
    config = read_json(directory / "checkpoint" / "config.json")
    family = _family(plan, config)
    name = (final or directory).resolve().name
    return write_trtllm_files(directory, plan, family, is_moe=_is_moe(plan), name=name)


def write_manifest(
    directory: Path,
    plan: Plan,
    *,
    name: str,
    command: list[str],
    inputs: dict[str, Any],
    stages: dict[str, Any],
    metrics: dict[str, Any],
    training: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """engine.json: what this engine is, what made it, and the hash of every file. Written last, atomically.

    ``inputs``: hashes of what it was made of. ``stages``: records, each with the hashes of its ``outputs``.
    ``training``: what was trained before the export, on what, and what it gave; None for nothing.
    """
    files = {
        path: digest
        for stage, record in stages.items()
        if stage != "train"  # what was trained is no part of what runs
        for path, digest in record.get("outputs", {}).items()
    }
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "format": plan.format,
        "formats": list(plan.formats),
        "quant_algo": _quant_algo(plan),
        "kv_cache": plan.kv_cache,
        "policy": plan.policy,
        "policy_options": plan.policy_options.said,
        "target": plan.target,
        "target_version": plan.target_version,
        "gpu": plan.gpu,
        "model": {"source": plan.model, "architecture": plan.architecture, "identity": plan.model_identity},
        "checkpoint": "checkpoint",
        "limits": {
            "max_batch_size": plan.serving.max_batch_size,
            "max_seq_len": plan.serving.max_seq_len,
            "max_num_tokens": max_num_tokens(plan),
        },
        "parallel": {"tp": plan.serving.tp, "ep": plan.serving.ep, "pp": plan.serving.pp},
        "metrics": metrics,
        **({"training": training} if training else {}),
        "inputs": inputs,
        "stages": stages,
        "command": command,
        "versions": package_versions(),
        "git_commit": git_commit(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "files": dict(sorted(files.items())),
    }
    manifest[DIGEST] = digest_of(manifest)
    atomic_write_json(directory / "engine.json", manifest)
    return manifest


def _is_moe(plan: Plan) -> bool:
    return any(item.role == "routed_expert" for item in plan.assignments)


def _family(plan: Plan, config: dict[str, Any]) -> Family:
    declared = next((family for family in FAMILIES if family.name == plan.family), None)
    return declared or get_family(config.get("model_type", ""), plan.architecture, ())


def _quant_algo(plan: Plan) -> str:
    """What the checkpoint's config says: one algorithm, or MIXED_PRECISION, as ``quantize/export.py`` decides."""
    algos = {get_format(name).quant_algo for name in plan.formats}
    head = any(item.role == Role.LM_HEAD.value and item.format in plan.formats for item in plan.assignments)
    return MIXED if len(algos) > 1 or head else algos.pop()
