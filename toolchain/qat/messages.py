"""What a training process tells the one that started it: JSON lines for a ``Progress``, a file for its failure."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import atomic_write_json, read_json
from toolchain.core.progress import Progress

T = TypeVar("T")


class Sender:
    """A Progress that writes its calls to ``stream``, one JSON object per line."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream, self._lock, self._tracks = stream, threading.Lock(), 0

    def note(self, text: str) -> None:
        self._send(note=text)

    def track(self, items: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
        self._tracks += 1
        number = self._tracks
        self._send(track=number, description=description, total=total)
        try:
            for item in items:
                self._send(step=number)
                yield item
        finally:
            self._send(end=number)

    @contextmanager
    def meter(self, *, description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: None

    def _send(self, **message: Any) -> None:
        with self._lock:
            self.stream.write(json.dumps(message) + "\n")
            self.stream.flush()


class Receiver:
    """Makes the same calls on a Progress here, line by line."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._tracks: dict[int, Iterator[int]] = {}

    def read(self, line: str) -> None:
        """A line that is no message (a library's own words) is passed over."""
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            return
        if not isinstance(message, dict):
            return
        if "note" in message:
            self.progress.note(str(message["note"]))
        elif "track" in message:
            total = message.get("total")
            endless = range(total if isinstance(total, int) else 1 << 62)
            self._tracks[message["track"]] = self.progress.track(
                endless, description=str(message.get("description", "")), total=total
            )
        elif "step" in message:
            next(self._tracks.get(message["step"], iter(())), None)
        elif "end" in message:
            getattr(self._tracks.pop(message["end"], None), "close", lambda: None)()


def write_failure(path: Path, error: BaseException) -> None:
    """What ended a process, for ``read_failure``."""
    known = error if isinstance(error, ToolchainError) else None
    said = known.to_json() if known else {"message": traceback.format_exception_only(error)[-1].strip()}
    usage = isinstance(error, UsageError)
    atomic_write_json(path, {**said, "known": known is not None, "usage": usage, "time": time.time()})


def read_failure(directory: Path) -> ToolchainError | None:
    """The first error of its own that a process met, as it was raised; None when none was one of ours."""
    found = [read_json(path) for path in sorted(directory.glob("failure-*.json"))]
    known = sorted((item for item in found if item.get("known")), key=lambda item: item["time"])
    if not known:
        return None
    kind = UsageError if known[0]["usage"] else ToolchainError
    return kind(known[0]["message"], hint=known[0]["hint"], code=known[0]["code"])
