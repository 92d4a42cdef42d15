"""What an evaluation has measured so far, on disk: one small file per batch, each complete or absent.

A run that was killed goes on after its last whole batch. Batches are independent of each other and nothing is sampled,
so the result is that of a run without interruption, bit for bit on the same machine.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json, lock, read_json, sha256_json
from toolchain.core.progress import Progress
from toolchain.evaluate.records import Batch

SETTINGS = "settings.json"
GENERATIONS = "generations.json"


def cache_directory(*parts: object) -> Path:
    """Where the state of an evaluation of ``parts`` (paths) is kept when no other place is given: the user's cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    names = [str(Path(str(part)).resolve()) if part is not None else None for part in parts]
    return root / "toolchain" / "evaluate" / sha256_json(names)[:16]


class State:
    """A directory that belongs to one evaluation; a context manager, locked while it is open.

    ``settings`` is everything that the figures depend on. What is there of other settings is dropped, and each change
    is named. Raises ToolchainError TC-526 for files that are not what this class writes, TC-008 when another run has
    the directory.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], progress: Progress) -> None:
        self.directory, self._settings, self._progress = directory, settings, progress
        self._handle = -1

    def __enter__(self) -> State:
        if self.directory.exists() and not self.directory.is_dir():
            raise _unusable(self.directory, "it is a file")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.directory, os.O_RDONLY)
        try:
            lock(self._handle, self.directory)
            self._open()
        except BaseException:
            os.close(self._handle)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is left of a run that finished nothing."""
        if self.directory.is_dir() and {path.name for path in self.directory.iterdir()} <= {SETTINGS}:
            self.remove()
        os.close(self._handle)

    def _open(self) -> None:
        """Keep what is of the same settings, drop what is of others."""
        file, foreign = self.directory / SETTINGS, self._foreign()
        if foreign:
            raise _unusable(self.directory, f"it holds {', '.join(foreign[:3])}, which no evaluation wrote")
        if file.is_file():
            before = _read(file)
            changed = _changes(before, self._settings)
            if not changed:
                return
            self._progress.note(
                f"the unfinished evaluation in {self.directory} was of other settings, it begins anew: "
                + "; ".join(changed)
            )
        for left in self.directory.iterdir():
            left.unlink()
        atomic_write_json(file, self._settings)

    def _foreign(self) -> list[str]:
        """Names that are not ours: a directory given by mistake must not lose its files."""
        known = (SETTINGS, GENERATIONS)
        names = [path.name for path in self.directory.iterdir()]
        return sorted(
            name
            for name in names
            if name not in known
            and not (name.startswith("batch-") and name.endswith(".safetensors"))
            and not (name.startswith(".") and name.endswith(".partial"))
        )

    def finished(self) -> list[Batch]:
        """The batches from the first on, as far as they are there."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        found: list[Batch] = []
        while (path := self._batch(len(found))).is_file():
            try:
                found.append(load_file(path))
            except (SafetensorError, OSError, ValueError) as error:
                raise _unusable(path, str(error)) from error
            if found[-1].keys() != found[0].keys():
                raise _unusable(path, "it has other figures than the first batch")
        return found

    def add(self, index: int, batch: Batch) -> None:
        """Write batch number ``index``."""
        from safetensors.numpy import save

        contiguous = {name: np.ascontiguousarray(values) for name, values in batch.items()}
        path = self._batch(index)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as handle:
            handle.write(save(contiguous))
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)

    def generations(self) -> list[dict[str, Any]] | None:
        """Answers that were generated before the interruption, if they were."""
        path = self.directory / GENERATIONS
        if not path.is_file():
            return None
        found = _read(path)
        if not isinstance(found, list):
            raise _unusable(path, "it is not a list")
        return found

    def keep_generations(self, answers: list[dict[str, Any]]) -> None:
        atomic_write_json(self.directory / GENERATIONS, answers)

    def remove(self) -> None:
        """Called when the result is complete."""
        shutil.rmtree(self.directory)

    def _batch(self, index: int) -> Path:
        return self.directory / f"batch-{index:06d}.safetensors"


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except ToolchainError as error:
        raise _unusable(path, error.message) from error


def _changes(before: Any, now: dict[str, Any]) -> list[str]:
    if not isinstance(before, dict):
        return ["its settings are no object"]
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} changed from {before.get(name)!r} to {now.get(name)!r}" for name in names]


def _unusable(path: Path, reason: str) -> ToolchainError:
    return ToolchainError(
        f"the state of the evaluation in {path} cannot be used: {reason}",
        hint=f"remove {path if path.is_dir() or not path.exists() else path.parent}; the evaluation begins anew",
        code="TC-526",
    )
