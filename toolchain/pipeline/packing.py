"""What writes an engine's checkpoint: quantization of the source, or the export of what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.core.files import require_free_bytes
from toolchain.pipeline.request import EngineRequest
from toolchain.pipeline.training import TRAINED
from toolchain.pipeline.workspace import Workspace
from toolchain.plan.types import Plan

CHECKPOINT = "checkpoint"
FACTS = (
    "calibration",
    "coverage",
    "starved_experts",
    "starved_remedy",
    "tf32",
    "seconds",
    "device",
    "tensor_bytes",
)
"""What engine.json repeats of quantize.json."""


def write_checkpoint(plan: Plan, request: EngineRequest, workspace: Workspace) -> dict[str, Any]:
    """``checkpoint/`` of the engine; returns the facts that its manifest tells."""
    output = workspace.directory / CHECKPOINT
    options: dict[str, Any] = dict(
        device=request.device,
        force=True,
        trust_remote_code=request.trust_remote_code,
        on_replace=workspace.unfinish,
        progress=workspace.progress,
    )
    if plan.training is not None:
        from toolchain.qat.export import export_trained

        manifest = export_trained(plan, workspace.directory / TRAINED, output, **options)
    else:
        from toolchain.quantize.job import quantize

        manifest = quantize(
            plan, output, stream=request.stream, executor=request.executor_options(), **options
        )
    sparse = {"sparsity": manifest["sparsity"]} if "sparsity" in manifest else {}
    return {key: manifest[key] for key in FACTS} | sparse


def require_space(plan: Plan, directory: Path) -> None:
    """ToolchainError TC-005 when a new engine would not fit on the disk: what is there already is written over."""
    needed = 0 if (directory / CHECKPOINT).exists() else plan.estimates.checkpoint_bytes
    needed += 0 if (directory / TRAINED).exists() else plan.estimates.training_disk_bytes
    if needed:
        require_free_bytes(directory, needed, what="the engine")
