"""Stage records: what a finished stage was asked, what it wrote, and whether that still holds.

``engines/<name>/stages/<stage>.json`` is written when the stage is complete. A later run skips the stage when the
settings are equal and every output file has its recorded hash; otherwise it says what changed and runs it again. The
record of a stage that failed or was killed stays: it tells by the hashes whether the old output is still there.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.environment import peak_memory_bytes
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import atomic_write_json, hash_tree, lock, read_json, sha256_file
from toolchain.core.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    settings: dict[str, Any]
    """Everything that decides the output: options, hashes of inputs, versions of packages."""
    outputs: tuple[Path, ...]
    """Files or directories that the stage writes."""
    run: Callable[[], dict[str, Any]]
    """Does the work; returns facts for the manifest."""


def run_stage(directory: Path, stage: Stage, *, force: bool, progress: Progress) -> dict[str, Any]:
    """Run or skip ``stage``; returns its record, with ``skipped`` set accordingly."""
    path = directory / "stages" / f"{stage.name}.json"
    reason = "forced" if force else _why_run(path, stage)
    if reason is None:
        progress.note(f"{stage.name}: unchanged, skipped")
        return {**read_json(path), "skipped": True}
    progress.note(f"{stage.name}: {reason}")
    started = time.monotonic()
    facts = stage.run()
    record = {
        "stage": stage.name,
        "settings": stage.settings,
        "outputs": _hashes(stage.outputs),
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "facts": facts,
    }
    atomic_write_json(path, record)
    return {**record, "skipped": False}


def _why_run(path: Path, stage: Stage) -> str | None:
    """None when the stage may be skipped, else the reason to run it."""
    if not path.is_file():
        return "running"
    try:
        record = read_json(path)
        before, hashes = record["settings"], record["outputs"]
    except (ToolchainError, KeyError, TypeError):
        return "its record is damaged, running again"
    changed = [key for key in {**before, **stage.settings} if before.get(key) != stage.settings.get(key)]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        return f"{key} changed from {_short(before.get(key))} to {_short(stage.settings.get(key))}{more}, running again"
    if _hashes(stage.outputs) != hashes:
        return "its output was changed or removed, running again"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hashes(outputs: tuple[Path, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for output in outputs:
        name = output.name
        if output.is_dir():
            found |= {f"{name}/{path}": digest for path, digest in hash_tree(output).items()}
        elif output.is_file():
            found[name] = sha256_file(output)
    return found


LOCK = ".lock"


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Only one run may write an engine directory; one that a failed first run leaves empty is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as handle:
        lock(handle.fileno(), directory)
        for left in directory.glob(".*.partial"):  # by a run that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield
        finally:
            if [path.name for path in directory.iterdir()] == [LOCK]:
                (directory / LOCK).unlink()
                directory.rmdir()


def refuse_foreign(directory: Path, *, force: bool) -> None:
    """UsageError when ``directory`` holds something, but no engine nor the beginning of one."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"output {directory} is a file, expected a directory", code="TC-004")
    if (
        force
        or not directory.is_dir()
        or (directory / "engine.json").is_file()
        or (directory / "stages").is_dir()
        or (directory / "training").is_dir()
    ):
        return
    visible = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    if visible:
        raise UsageError(
            f"output directory {directory} is not empty and no engine (it holds {', '.join(visible[:3])})",
            hint="choose another --output, or pass --force to write the engine into it",
            code="TC-004",
        )
