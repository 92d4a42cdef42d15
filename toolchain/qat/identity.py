"""Whether what lies on disk is of this plan: settings that decide a student, and hashes of its files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.files import sha256_file, sha256_json
from toolchain.plan.types import Plan


def settings_of(plan: Plan) -> dict[str, Any]:
    """What of a plan decides the student before its first step, and how it is packed: JSON."""
    assignments = [[item.role, item.layer, item.format, list(item.projections)] for item in plan.assignments]
    return {
        "model_identity": plan.model_identity,
        "format": plan.format,
        "recipe": plan.recipe,
        "kv_cache": plan.kv_cache,
        "assignments_sha256": sha256_json(assignments),
        "calibration": {**asdict(plan.calibration), "data": list(plan.calibration.sources)},
        "sparsity": asdict(plan.sparsity) if plan.sparsity else None,
    }


def require_settings(found: dict[str, Any], plan: Plan, where: Path) -> None:
    """ToolchainError TC-252 that names each setting in which ``plan`` differs from the one ``where`` was made by."""
    wanted = settings_of(plan)
    changed = sorted(key for key in wanted if found.get(key) != wanted[key])
    if changed:
        raise ToolchainError(
            f"{where} was made with another {', '.join(changed)} than the plan has",
            hint="train again from the beginning, or use the plan that it was made by",
            code="TC-252",
        )


def require_unchanged(directory: Path, files: dict[str, str]) -> None:
    """ToolchainError TC-252 unless ``files`` (name -> SHA-256) are in ``directory`` with these bytes."""
    for name, digest in files.items():
        path = directory / name
        if not path.is_file() or sha256_file(path) != digest:
            raise ToolchainError(
                f"{path} {'was changed' if path.is_file() else 'is missing'}",
                hint="it belongs to the files beside it: train again",
                code="TC-252",
            )
