"""``quantize.json``: what was made, of what, how, and by which versions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from toolchain.core.environment import package_versions
from toolchain.data.overlap import sketch
from toolchain.plan.types import Plan
from toolchain.quantize import starved
from toolchain.quantize.calibration import CalibrationSet


def make_manifest(
    plan: Plan,
    *,
    device: torch.device,
    data: CalibrationSet | None,
    coverage: dict[str, Any] | None,
    details: dict[str, Any],
    seconds: dict[str, float],
    streamed: str | None = None,
) -> dict[str, Any]:
    """All but what is known when the files are written.

    ``details``: what the recipe did. ``streamed``: ``data-free`` or ``layers``; None for a whole model in memory.
    """
    return {
        "schema_version": 1,
        "format": plan.format,
        "policy": plan.policy,
        "recipe": plan.recipe,
        **({"auto": plan.auto} if plan.auto else {}),
        "kv_cache": plan.kv_cache,
        "model": plan.model,
        "model_identity": plan.model_identity,
        "device": str(device),
        **({"streamed": streamed} if streamed else {}),
        "calibration": data.identity if data else None,
        "calibration_sketch": sketch(data.tokens.numpy()) if data else None,
        **starved.manifest_entries(coverage),
        **details,
        **_sparsity(plan, details),
        "seconds": seconds,
        "versions": package_versions(),
        "tf32": plan.calibration.allow_tf32,
    }


def _sparsity(plan: Plan, details: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, and the counts where the model was in memory; nothing of a dense plan."""
    return {"sparsity": {**asdict(plan.sparsity), **details.get("sparsity", {})}} if plan.sparsity else {}
