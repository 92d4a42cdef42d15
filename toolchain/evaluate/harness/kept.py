"""``tasks.json`` of an engine: what its tasks gave, for its report and model card. Holds for the bytes that ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json, read_json
from toolchain.evaluate.gates import checkpoint_identity

FILE = "tasks.json"
SAME = ("harness", "settings")
"""What must be equal for results of several runs to stand side by side."""


def keep_tasks(engine: Path, document: dict[str, Any]) -> Path | None:
    """Write what ``run_tasks`` returned beside ``engine``/engine.json; None where that is no engine.

    Results of other tasks stay where they are of the same bytes and settings; else they are dropped.
    """
    if not (engine / "engine.json").is_file():
        return None
    before = read_tasks(engine) or {}
    merged = dict(document)
    if all(before.get(key) == document[key] for key in SAME):
        for part in ("results", "groups"):
            merged[part] = {**before.get(part, {}), **document[part]}
    atomic_write_json(engine / FILE, {"schema_version": 1, "identity": _identity(engine), **merged})
    return engine / FILE


def read_tasks(engine: Path) -> dict[str, Any] | None:
    """What was kept for the bytes that ``engine`` has now; None without."""
    path = engine / FILE
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except ToolchainError:
        return None  # a damaged record is as good as none: running the tasks writes it again
    return value if isinstance(value, dict) and value.get("identity") == _identity(engine) else None


def _identity(engine: Path) -> str:
    return checkpoint_identity(read_json(engine / "engine.json").get("files", {}))
