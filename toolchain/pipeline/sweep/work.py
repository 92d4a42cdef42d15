"""One cell, in this process: its engine, then its record."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from toolchain.core.environment import package_versions
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import sha256_json
from toolchain.core.progress import Progress
from toolchain.models.hub import is_hub_id
from toolchain.models.reader import resolve_model
from toolchain.pipeline.engine import Until, make_engine
from toolchain.pipeline.inputs import CALIBRATION_FILE, READ, text_identity, texts_identity
from toolchain.pipeline.judging import held_out_text
from toolchain.pipeline.settings import NUMERIC_PACKAGES
from toolchain.pipeline.sweep.figures import figures_of
from toolchain.pipeline.sweep.place import Place
from toolchain.pipeline.sweep.planning import PlannedCell, code_of, reason
from toolchain.plan.types import Plan

STAGES: tuple[Until, ...] = ("quantize", "evaluate", "build")
LOCKED = "TC-008"
"""Another process is at work on this cell: its outcome is that one's."""
WRITTEN = ("checkpoint", "plan.json", "verify.json", "metrics.json", "engine.json")
"""What a finished cell must still have as it was."""


def run_cell(
    planned: PlannedCell,
    place: Place,
    *,
    until: Until,
    command: list[str],
    force: bool = False,
    progress: Progress,
) -> dict[str, Any]:
    """Make the cell's engine up to ``until`` and write its record, which is returned.

    What fails is recorded and raised; nothing is recorded where another process has the cell (TC-008).
    """
    cell, started = planned.cell, time.monotonic()
    if planned.error is not None:
        place.write(cell.name, refused(planned))
        raise planned.error
    if cell.request is None or planned.plan is None:
        raise ToolchainError(f"cell {cell.name} was not planned")
    engine = place.engine(cell.name)
    hashes = place.hashes(planned.plan.model_identity)
    known = engine / "stages" / "inputs" / "model.json"
    try:
        _lend(hashes, known)
        make_engine(cell.request, engine, None, command=command, until=until, force=force, progress=progress)
        _lend(known, hashes)
    except Exception as error:
        if getattr(error, "code", None) != LOCKED:
            place.write(cell.name, failed(planned, until, error, time.monotonic() - started))
        raise
    record = {
        "state": "finished",
        "until": until,
        "request": cell.identity,
        "fingerprint": fingerprint(planned, place, until),
        "figures": figures_of(engine),
    }
    place.write(cell.name, record)
    return record


def refused(planned: PlannedCell) -> dict[str, Any]:
    """The record of a cell that has no plan."""
    return {"state": "refused", "request": planned.cell.identity, "error": _said(planned.error)}


def failed(planned: PlannedCell, until: Until, error: BaseException, seconds: float) -> dict[str, Any]:
    """The record of a cell that ended with ``error``."""
    return {
        "state": "failed",
        "until": until,
        "request": planned.cell.identity,
        "error": _said(error),
        "seconds": round(seconds, 2),
    }


def _said(error: BaseException | None) -> dict[str, Any]:
    if isinstance(error, ToolchainError):
        return {"code": code_of(error), "message": reason(error), "hint": error.hint}
    return {"code": "TC-000", "message": f"unexpected {type(error).__name__}: {error}", "hint": ""}


def is_finished(planned: PlannedCell, place: Place, until: Until) -> bool:
    """Whether the record of the cell holds: same request, inputs and packages, and its files as they were written.

    A quick look at sizes and times, which may only err towards running the cell again: then its stages compare hashes.
    """
    record = place.read(planned.cell.name)
    if record.get("state") != "finished" or record.get("until") not in STAGES[STAGES.index(until) :]:
        return False
    return record.get("fingerprint") == fingerprint(planned, place, record["until"])


def fingerprint(planned: PlannedCell, place: Place, until: Until) -> str:
    """Hex SHA-256 of what decides the result, and of names, sizes and times of the files that it was written to."""
    cell, plan = planned.cell, planned.plan
    if plan is None or cell.request is None:
        raise UsageError(f"cell {cell.name} has no plan", code="TC-180")
    model, versions = _local(plan), package_versions()
    sources = plan.calibration.sources or ((str(model / CALIBRATION_FILE),) if model else ())
    held_out = held_out_text(cell.request, model) if model else None
    engine = place.engine(cell.name)
    value = {
        "request": cell.identity,
        "until": until,
        "plan": plan.to_json(),
        "versions": {name: versions.get(name) for name in NUMERIC_PACKAGES},
        "model": _state([path for path in model.iterdir() if path.suffix in READ]) if model else None,
        "calibration": texts_identity([Path(source) for source in sources]),
        "held_out": text_identity(held_out),
        "written": [_state([engine / name, *(engine / name).rglob("*")]) for name in WRITTEN],
    }
    return sha256_json(value)


def _local(plan: Plan) -> Path | None:
    """The model's directory; None where it was never fetched."""
    if not Path(plan.model).is_dir() and not is_hub_id(plan.model):
        return None
    try:
        return resolve_model(plan.model, allow_download=False)
    except ToolchainError:
        return None


def _state(paths: list[Path]) -> list[list[object]]:
    found = [(str(path), path.stat()) for path in sorted(paths) if path.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def _lend(source: Path, target: Path) -> None:
    """Hashes of the model's large files, found once, are good for all cells: each is kept with size and time."""
    if source.is_file() and not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        own = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(source, own)
        own.replace(target)
