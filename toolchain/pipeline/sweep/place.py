"""The directory of a sweep: engines, a record per cell, and the table made of the records."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import atomic_write_json, lock, read_json

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    directory: Path

    @property
    def spec(self) -> Path:
        """What the last run of all cells was asked."""
        return self.directory / "spec.yaml"

    def engine(self, name: str) -> Path:
        return self.directory / "engines" / name

    def record(self, name: str) -> Path:
        return self.directory / "cells" / f"{name}.json"

    def log(self, name: str) -> Path:
        """What the process of the cell said, the last time that it was run."""
        return self.directory / "cells" / f"{name}.log"

    def hashes(self, identity: str) -> Path:
        """Hashes of the large files of one model, which all cells of it need."""
        return self.directory / "models" / f"{identity[:16]}.json"

    def read(self, name: str) -> dict[str, Any]:
        """The record of a cell; empty where there is none. One that was damaged is none: the cell runs again."""
        path = self.record(name)
        try:
            found = read_json(path) if path.is_file() else {}
        except ToolchainError:
            return {}
        return found if isinstance(found, dict) and found.get("schema_version") == SCHEMA_VERSION else {}

    def write(self, name: str, record: dict[str, Any]) -> None:
        atomic_write_json(self.record(name), {"schema_version": SCHEMA_VERSION, "cell": name, **record})

    def refuse_foreign(self) -> None:
        """UsageError TC-004 when the directory holds something, but no sweep."""
        path = self.directory
        if path.exists() and not path.is_dir():
            raise UsageError(f"output {path} is a file, expected a directory", code="TC-004")
        held = (
            {item.name for item in path.iterdir() if not item.name.startswith(".")}
            if path.is_dir()
            else set()
        )
        if held and not held & {"cells", "spec.yaml", "sweep.json"}:
            raise UsageError(
                f"output directory {path} is not empty and no sweep (it holds {', '.join(sorted(held)[:3])})",
                hint="choose another --output",
                code="TC-004",
            )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """One run over all cells at a time; single cells of an array of jobs do not ask. TC-008 for a second one."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".lock").open("w") as handle:
            lock(handle.fileno(), self.directory)
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Jobs of an array end at any time: one after the other reads the records and writes the table."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".table.lock").open("w") as handle:
            with contextlib.suppress(OSError):  # some network file systems have no locks: the last one wins
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def replace_text(self, name: str, text: str) -> None:
        """Write a file that several machines may write at the same time: each its own, then renamed."""
        own = self.directory / f".{name}.{os.uname().nodename}-{os.getpid()}"
        with own.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        own.replace(self.directory / name)
