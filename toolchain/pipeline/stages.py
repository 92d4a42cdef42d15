"""Stage records: what a finished stage was asked, what it wrote, and whether that still holds.

``engines/<name>/stages/<stage>.json`` is written when the stage is complete. A later run skips the stage when the
settings are equal and every output file has its recorded hash; otherwise it says what changed and runs it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.environment import peak_memory_bytes
from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json, hash_tree, read_json, sha256_file
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
    path.unlink(missing_ok=True)
    started = time.monotonic()
    facts = stage.run()
    record = {
        "stage": stage.name,
        "settings": stage.settings,
        "outputs": _hashes(directory, stage.outputs),
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
    root = path.parent.parent
    if _hashes(root, stage.outputs) != hashes:
        return "its output was changed or removed, running again"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hashes(root: Path, outputs: tuple[Path, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for output in outputs:
        name = output.name
        if output.is_dir():
            found |= {f"{name}/{path}": digest for path, digest in hash_tree(output).items()}
        elif output.is_file():
            found[name] = sha256_file(output)
    return found


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Only one run may write an engine directory; the lock goes with the process, however it ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ToolchainError(
                f"{directory} is being written by another run",
                hint="wait for it, or use another --output",
                code="TC-008",
            ) from error
        yield
