"""What decides the output of each stage: a changed setting is named, and the stages that depend on it run again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from toolchain.core.environment import package_versions
from toolchain.core.files import sha256_json
from toolchain.plan.types import Plan

NUMERIC_PACKAGES = ("torch", "transformers", "nvidia-modelopt", "toolchain")
"""A change of version of these may change bytes."""


def quantize_settings(
    plan: Plan, *, device: str, model_files: dict[str, str], calibration_hash: str | None
) -> dict[str, Any]:
    """Model, format and calibration; nothing of serving, so that other limits do not quantize again."""
    versions = package_versions()
    return {
        "model": plan.model,
        "model_identity": plan.model_identity,
        **{f"model file {name}": digest for name, digest in model_files.items()},
        "format": plan.format,
        "policy": plan.policy,
        **{f"policy.{key}": value for key, value in asdict(plan.policy_options).items()},
        "assignments": sha256_json(
            [(item.role, item.layer, item.projections, item.format) for item in plan.assignments]
        ),
        "recipe": plan.recipe,
        **{
            f"sparsity.{key}": value
            for key, value in (asdict(plan.sparsity) if plan.sparsity else {}).items()
        },
        "kv_cache": plan.kv_cache,
        **{f"calibration.{key}": _as_json(value) for key, value in asdict(plan.calibration).items()},
        "calibration.file": calibration_hash,
        "device": device,
        **{f"version of {name}": versions.get(name) for name in NUMERIC_PACKAGES},
    }


def _as_json(value: Any) -> Any:
    """Settings are compared with those that were read back from a record."""
    return list(value) if isinstance(value, tuple) else value


def plan_settings(plan: Plan) -> dict[str, Any]:
    """All of the plan: the request key by key, what was computed from it as one hash."""
    value = plan.to_json()
    if plan.training is None:  # as before there was training: engines that were made then stay as they are
        value["estimates"] = {
            key: item for key, item in value["estimates"].items() if not key.startswith("training")
        }
    arithmetic = sha256_json([value.pop(key) for key in ("assignments", "estimates", "findings")])
    named = ("serving", "calibration", "policy_options", *(["training"] if plan.training else []))
    groups = {key: value.pop(key) for key in named}
    flat = {
        f"{group}.{key}": _as_json(item) for group, items in groups.items() for key, item in items.items()
    }
    return {**value, **flat, "arithmetic": arithmetic}


def training_settings(
    plan: Plan, quantize: dict[str, Any], texts: dict[str, str | None], start: str | None
) -> dict[str, Any]:
    """Of the stage `train`: all that decides the calibration (``quantize``), the training, and ``texts``, hashes of
    what it reads by name; ``start``: hash of the checkpoint that it starts from."""
    asked = plan.training.deciding() if plan.training else {}
    return {
        **quantize,
        **{f"training.{key}": _as_json(value) for key, value in asked.items()},
        **{f"training.{name}": digest for name, digest in texts.items()},
        "training.start": start,
    }


def build_settings(plan: Plan, bytes_identity: str) -> dict[str, Any]:
    """``bytes_identity``: hash over the checkpoint's files."""
    return {
        "checkpoint": bytes_identity,
        "target": plan.target,
        "target_version": plan.target_version,
        "gpu": plan.gpu,
        **{f"serving.{key}": value for key, value in asdict(plan.serving).items()},
    }
