"""A trained directory -> the quantized checkpoint, under the quantizers that it was trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolchain.core.progress import Progress
from toolchain.plan.types import Plan


def export_trained(
    plan: Plan,
    trained: Path,
    output: Path,
    *,
    device: str = "auto",
    force: bool = False,
    on_replace: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack ``trained`` into ``output`` and return the manifest, in the form of ``quantize.job.quantize``."""
    raise NotImplementedError
