"""One pass over all bytes of a checkpoint: every tensor is read once, in the order of the files, and checked.

Read into a few buffers (``reading.py``) and not through a mapping: mapped pages count as memory of the process, and a
file that is cut off while it is read would end it with a signal. Peak memory is CHUNK times three times the threads,
whatever the size of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import local

from toolchain.checkpoint.audit import codes
from toolchain.checkpoint.audit.reading import Buffer, ShardFile
from toolchain.checkpoint.raw import Place
from toolchain.core.progress import Progress

CHUNK = 4 << 20
"""Bytes read at a time: long enough for disks, short enough for many threads."""
THREADS = 8
"""More than cores: most of them wait for the disk."""
UNIT = 256 << 20
"""Bytes of neighbouring tensors that one thread takes at a time."""
SMALL = 64
"""Tensors of up to this many bytes are kept: the scalars that rules compare."""


@dataclass(kw_only=True)
class Seen:
    """What one tensor's bytes were."""

    elements: int = 0
    not_finite: int = 0
    low: int = 0
    """Scales that are zero or negative."""
    zero: bool = True
    """True when every element is zero."""
    small: bytes = b""
    """The tensor itself, if it has at most SMALL bytes."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A tensor to look at."""

    name: str
    place: Place
    dtype: str
    scale: bool
    """True: finite and positive values are demanded; False: finite ones."""


@dataclass(kw_only=True)
class _Unit:
    file: str
    tasks: list[Task] = field(default_factory=list)
    size: int = 0


class Scan:
    """Reads and checks ``tasks`` in threads from the moment that it is made; ``result`` waits for the end."""

    def __init__(self, directory: Path, tasks: Iterable[Task], *, threads: int | None = None) -> None:
        self._directory, self._own = directory, local()
        self._units = list(_units(tasks))
        threads = threads or THREADS
        self._pool = ThreadPoolExecutor(max_workers=max(1, threads), thread_name_prefix="scan")
        self._running = [self._pool.submit(self._unit, unit) for unit in self._units]

    def result(self, progress: Progress) -> dict[str, Seen]:
        """Tensor name -> what was seen. ToolchainError TC-015 when a file became shorter than its header says."""
        found: dict[str, Seen] = {}
        try:
            for run in progress.track(self._running, description="verify values", total=len(self._running)):
                found |= run.result()
        finally:
            self.close()
        return found

    def close(self) -> None:
        """Drop what was not begun: an audit that fails elsewhere must not go on reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _unit(self, unit: _Unit) -> dict[str, Seen]:
        if not hasattr(self._own, "buffer"):
            self._own.buffer, self._own.scratch = Buffer(CHUNK), codes.Scratch(CHUNK)
        found = {task.name: Seen() for task in unit.tasks}
        first, last = unit.tasks[0].place, unit.tasks[-1].place
        size = last.start + last.size - first.start
        with ShardFile(self._directory / unit.file, start=first.start, size=max(size, 1)) as shard:
            for start, size, parts in _reads(unit.tasks):
                data = shard.read(self._own.buffer, start, size)
                for task, begin, end in parts:
                    _look(found[task.name], task, data[begin:end], self._own.scratch)
        return found


def _units(tasks: Iterable[Task]) -> Iterator[_Unit]:
    """Neighbours in one file, of UNIT bytes or one larger tensor."""
    unit: _Unit | None = None
    for task in sorted(tasks, key=lambda item: (item.place.file, item.place.start)):
        if unit is None or unit.file != task.place.file or unit.size + task.place.size > UNIT:
            if unit is not None:
                yield unit
            unit = _Unit(file=task.place.file)
        unit.tasks.append(task)
        unit.size += task.place.size
    if unit is not None:
        yield unit


def _reads(tasks: list[Task]) -> Iterator[tuple[int, int, list[tuple[Task, int, int]]]]:
    """(offset, bytes, [(tensor, begin, end) within them]): many small tensors in one read, large ones in pieces."""
    start, used = 0, 0
    parts: list[tuple[Task, int, int]] = []
    for task in tasks:
        place = task.place
        if parts and (place.start != start + used or used + place.size > CHUNK):
            yield start, used, parts
            parts, used = [], 0
        if place.size > CHUNK:
            for offset in range(0, place.size, CHUNK):
                size = min(CHUNK, place.size - offset)
                yield place.start + offset, size, [(task, 0, size)]
            continue
        if not parts:
            start = place.start
        parts.append((task, used, used + place.size))
        used += place.size
    if parts:
        yield start, used, parts


def _look(seen: Seen, task: Task, data: codes.Bytes, scratch: codes.Scratch) -> None:
    if data.size <= SMALL and task.place.size == data.size:
        seen.small = data.tobytes()
    if seen.zero:
        seen.zero = codes.is_zero(data, task.dtype)
    kind = codes.KINDS.get(task.dtype)
    if kind is None:
        return
    seen.elements += data.size // kind.width
    if task.scale:
        not_finite, low = codes.bad_scales(data, kind)
        seen.not_finite += not_finite
        seen.low += low
    elif scratch.has_non_finite(data, kind):
        seen.not_finite += codes.non_finite(data, kind)
