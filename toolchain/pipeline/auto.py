"""``--format auto``: the stage that measures and chooses, before anything is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.auto.outcome import plan_of
from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json, read_json, sha256_json
from toolchain.core.progress import Progress
from toolchain.models.reader import resolve_model
from toolchain.pipeline.inputs import CALIBRATION_FILE, model_files, texts_identity
from toolchain.pipeline.planning import find_request_space
from toolchain.pipeline.request import EngineRequest
from toolchain.pipeline.settings import quantize_settings
from toolchain.plan.planner import require_clean
from toolchain.plan.types import Plan

if TYPE_CHECKING:
    from toolchain.auto.space import Space

FILE = "auto.json"
"""Beside plan.json of an engine; ``<output>.auto.json`` beside a checkpoint of ``toolchain quantize``."""


def choose_formats(
    request: EngineRequest, smallest: Plan, record: Path, *, force: bool, progress: Progress
) -> Plan:
    """The plan that the search keeps. ``record`` is read when it was written for the same inputs, else written.

    ``smallest`` is the plan of ``make_request_plan``. See ``toolchain.auto.search.search`` for errors.
    """
    space = find_request_space(request)
    source = resolve_model(smallest.model)
    sources = smallest.calibration.sources or (str(source / CALIBRATION_FILE),)
    settings = auto_settings(
        request,
        space,
        smallest,
        model_files=model_files(source, None),
        calibration_hash=texts_identity([Path(item) for item in sources]),
    )
    if force or _settings_of(record) != settings:
        progress.note(f"auto: measuring, to be kept in {record}")
        document = run_search(request, space, progress)
        record.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(record, {**document, "settings": settings})
    else:
        progress.note(f"auto: unchanged, read from {record}")
    return outcome(space, record, progress)


def run_search(request: EngineRequest, space: Space, progress: Progress) -> dict[str, Any]:
    """The document of ``toolchain.auto.search``."""
    from toolchain.auto.search import search

    return search(
        space, device=request.device, trust_remote_code=request.trust_remote_code, progress=progress
    )


def outcome(space: Space, record: Path, progress: Progress) -> Plan:
    """The plan that ``record`` keeps, clean; what the search says about it goes to ``progress``."""
    plan = require_clean(plan_of(space, read_json(record)))
    for finding in plan.findings:
        progress.note(str(finding))
    return plan


def auto_settings(
    request: EngineRequest,
    space: Space,
    smallest: Plan,
    *,
    model_files: dict[str, str],
    calibration_hash: str | None,
) -> dict[str, Any]:
    """Everything that decides the choice: what quantization depends on, the budget, and what the target runs."""
    return {
        **quantize_settings(
            smallest, device=request.device, model_files=model_files, calibration_hash=calibration_hash
        ),
        "auto.bits": space.auto.bits,
        "auto.formats": list(space.formats),
        "auto.method": space.auto.method,
        "auto.cost": space.auto.cost,
        "auto.choices": sha256_json(space.options),
        "target": smallest.target,
        "target_version": smallest.target_version,
        "gpu": smallest.gpu,
    }


def _settings_of(record: Path) -> Any:
    if not record.is_file():
        return None
    try:
        value = read_json(record)
    except ToolchainError:
        return None
    return value.get("settings") if isinstance(value, dict) else None
