"""What is finished of a streamed checkpoint, so that a run that was killed goes on and never starts over silently.

Beside the output, hidden: ``.<output>.streaming/stream.json`` (the settings), ``content/`` (what the output will be)
and ``finished/<shard>.json`` (its hash). A shard is finished when its record is there and its bytes have that hash.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.files import atomic_write_json, lock, read_json, refuse_occupied, sha256_file
from toolchain.core.progress import Progress

SETTINGS = "stream.json"


class Journal:
    """The working directory of one output. Use ``open_journal``."""

    def __init__(self, root: Path) -> None:
        self.root, self.content, self._finished = root, root / "content", root / "finished"
        self.layers = root / "layers"
        """What a run layer by layer remembers (``layer_journal.py``)."""

    def partial(self, file: str) -> Path:
        """Where the shard ``file`` grows."""
        return self.content / f".{file}.partial"

    def finish(self, file: str, sha256: str) -> None:
        """The shard's bytes are on the disk: give it its name, then record it."""
        self.partial(file).replace(self.content / file)
        _sync(self.content)
        size = (self.content / file).stat().st_size
        atomic_write_json(self._finished / f"{file}.json", {"sha256": sha256, "bytes": size})

    def finished(self, files: list[str], progress: Progress) -> dict[str, str]:
        """File -> hash of those that are finished and still as they were written; others are removed."""
        kept: dict[str, str] = {}
        recorded = [file for file in files if (self._finished / f"{file}.json").is_file()]
        for file in progress.track(recorded, description="check finished shards", total=len(recorded)):
            record, path = read_json(self._finished / f"{file}.json"), self.content / file
            if path.is_file() and path.stat().st_size == record["bytes"]:
                if sha256_file(path) == record["sha256"]:
                    kept[file] = record["sha256"]
                    continue
                progress.note(f"{file} was changed after it was written: it is made again")
            (self._finished / f"{file}.json").unlink()
        for path in self.content.iterdir():
            if path.name not in kept:
                path.unlink()
        return kept


@contextlib.contextmanager
def open_journal(
    output: Path, settings: dict[str, Any], *, force: bool, progress: Progress
) -> Iterator[Journal]:
    """The journal of ``output``, locked. It stays when the work fails; the caller moves ``content`` at the end.

    UsageError TC-004 when the output is occupied and not ``force``; TC-231 when it was begun with other settings,
    unless ``force``, which begins anew. ToolchainError TC-008 when another process works on it.
    """
    refuse_occupied(output, force=force)
    root = output.with_name(f".{output.name}.streaming")
    root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root, os.O_RDONLY)
    try:
        lock(handle, output)
        journal = Journal(root)
        _begin(journal, output, settings, force=force, progress=progress)
        yield journal
    finally:
        os.close(handle)


def _begin(
    journal: Journal, output: Path, settings: dict[str, Any], *, force: bool, progress: Progress
) -> None:
    path = journal.root / SETTINGS
    before = read_json(path) if path.is_file() else None
    if before is not None and before != settings:
        names = sorted(key for key in {**before, **settings} if before.get(key) != settings.get(key))
        changes = "; ".join(f"{name}: {before.get(name)!r} -> {settings.get(name)!r}" for name in names[:5])
        if not force:
            raise UsageError(
                f"{output} was begun with other settings ({changes})",
                hint="run it with the settings it was begun with, choose another --output, or begin anew with --force",
                code="TC-231",
            )
        progress.note(f"what was begun with other settings is dropped ({changes})")
        before = None
    if before is None:
        for name in ("content", "finished", "layers"):
            shutil.rmtree(journal.root / name, ignore_errors=True)
        atomic_write_json(path, settings)
    for name in ("content", "finished", "layers"):
        (journal.root / name).mkdir(exist_ok=True)


def forget_unfinished(output: Path) -> None:
    """What a streamed run that ended early left beside ``output``, which has been made in another way."""
    shutil.rmtree(output.with_name(f".{output.name}.streaming"), ignore_errors=True)


def publish(journal: Journal, output: Path) -> None:
    """Move what was made to ``output``, in place of what is there, and forget the journal."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    journal.content.rename(output)
    _sync(output.parent)
    shutil.rmtree(journal.root)
    shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Names survive a loss of power only when their directory is flushed, too."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
