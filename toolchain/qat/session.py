"""The work directory of one training: what it was begun with, how far it is, and that nobody else is at it.

``settings.json`` (everything that the result depends on), ``start/`` (the student before the first step),
``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``. A killed training goes on from here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json, lock, read_json
from toolchain.core.progress import Progress
from toolchain.plan.types import Plan
from toolchain.qat.files import CHECKPOINTS, METRICS, SETTINGS, START, TENSORBOARD
from toolchain.qat.identity import settings_of
from toolchain.qat.metrics import MetricsLog
from toolchain.qat.state import TRAINER_STATE, checkpoints


@dataclass(frozen=True, kw_only=True)
class Session:
    directory: Path

    @property
    def start(self) -> Path:
        return self.directory / START

    @property
    def metrics(self) -> MetricsLog:
        return MetricsLog(self.directory)

    def checkpoints(self) -> dict[int, Path]:
        return checkpoints(self.directory / CHECKPOINTS)

    def newest(self) -> Path | None:
        """The checkpoint to go on from; None at the very beginning."""
        return next(reversed(self.checkpoints().values()), None)

    def state(self) -> dict[str, Any]:
        """``trainer_state.json`` of the newest checkpoint: step, best step, tokens."""
        newest = self.newest()
        if newest is None:
            raise ToolchainError(
                f"the training in {self.directory} has no checkpoint", hint="train again", code="TC-256"
            )
        found: dict[str, Any] = read_json(newest / TRAINER_STATE)
        return found

    def drop_after(self, step: int) -> None:
        """Forget what came after the checkpoint of ``step``. ToolchainError TC-256 when there is none."""
        found = self.checkpoints()
        if step not in found:
            raise ToolchainError(
                f"{self.directory} has no checkpoint of step {step}; it has {', '.join(map(str, found)) or 'none'}",
                hint="choose one of these",
                code="TC-256",
            )
        for other, path in found.items():
            if other > step:
                shutil.rmtree(path)


@contextmanager
def open_session(
    directory: Path,
    settings: dict[str, Any],
    *,
    restart: bool = False,
    from_step: int | None = None,
    progress: Progress,
) -> Iterator[Session]:
    """The training in ``directory``, locked: begun now, or begun before with the same ``settings``.

    ToolchainError TC-256 names what is different, TC-008 when another process trains there; ``restart`` forgets what is
    there instead, ``from_step`` what came after that step.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        lock(handle, directory)
        if restart:
            _clear(directory)
        file = directory / SETTINGS
        if file.is_file():
            _require_same(directory, read_json(file), settings)
        else:
            _clear(directory)
            atomic_write_json(file, settings)
        session = Session(directory=directory)
        if from_step is not None:
            session.drop_after(from_step)
        newest = session.newest()
        if newest is not None:
            progress.note(f"going on from {newest}")
        yield session
    finally:
        os.close(handle)


def begun_with(plan: Plan, data: dict[str, Any]) -> dict[str, Any]:
    """Everything that the result of a training depends on, but versions; ``data``: identity of the sequences."""
    training = plan.training.deciding() if plan.training else {}
    described: dict[str, Any] = _plain({**settings_of(plan), "training": training, "data": data})
    return described


def _plain(value: Any) -> Any:
    """As JSON has it: lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _require_same(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    first, second = _flat(before), _flat(now)
    changed = [
        f"{name} changed from {first.get(name)!r} to {second.get(name)!r}"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]
    if changed:
        raise ToolchainError(
            f"the training in {directory} was begun with other settings: {'; '.join(changed[:5])}",
            hint="go on with those, choose another --output, or begin anew with --force",
            code="TC-256",
        )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= (
            _flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {f"{prefix}{key}": item}
        )
    return found


def _clear(directory: Path) -> None:
    """Remove what a training writes, and only that: a directory given by mistake must not lose its files."""
    for name in (START, CHECKPOINTS, TENSORBOARD):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in (SETTINGS, METRICS):
        (directory / name).unlink(missing_ok=True)
