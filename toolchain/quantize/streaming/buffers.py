"""Memory that is used again: a page that a process touches for the first time costs more than the copy into it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

KEPT_BYTES = 128 << 20
"""Buffers that nobody uses, at most."""


class Buffers:
    """uint8 arrays by size. May be used from several threads."""

    def __init__(self) -> None:
        self._free: dict[int, list[Any]] = {}
        self._kept = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Any:
        """An array of ``size`` bytes with any content."""
        with self._lock:
            found = self._free.get(size)
            if found:
                self._kept -= size
                return found.pop()
        return np.empty(size, dtype=np.uint8)

    def give(self, buffer: Any) -> None:
        """Nothing refers to ``buffer`` any more."""
        with self._lock:
            if self._kept + buffer.nbytes <= KEPT_BYTES:
                self._free.setdefault(buffer.nbytes, []).append(buffer)
                self._kept += buffer.nbytes

    @contextmanager
    def lent(self, size: int) -> Iterator[Any]:
        buffer = self.take(size)
        try:
            yield buffer
        finally:
            self.give(buffer)


class Held:
    """Whole tensors that are going to be looked at twice, within a budget. May be used from several threads.

    One thread at a time has to do with a tensor: whoever looks for the scale that a group shares first, then whoever
    packs it.
    """

    def __init__(self, buffers: Buffers, *, budget: int = 192 << 20, largest: int = 64 << 20) -> None:
        """``budget``: bytes of all that is held, buffers on the way included; ``largest``: of one tensor."""
        self._buffers, self._budget, self._largest = buffers, budget, largest
        self._arrays: dict[str, Any] = {}
        self._used = 0
        self._lock = threading.Lock()

    def get(self, name: str) -> Any:
        """The bytes of ``name``, or None."""
        with self._lock:
            return self._arrays.get(name)

    def reserve(self, name: str, size: int) -> Any:
        """A buffer for ``name``, to be filled and handed to ``keep``; None when it is held already or too large."""
        with self._lock:
            if name in self._arrays or size > self._largest or self._used + size > self._budget:
                return None
            self._used += size
        return self._buffers.take(size)

    def keep(self, name: str, buffer: Any) -> None:
        with self._lock:
            before = self._arrays.get(name)
            self._arrays[name] = buffer
            if before is not None:
                self._used -= before.nbytes

    def release(self, name: str) -> None:
        """``name`` is not needed any more, and nothing refers to its bytes."""
        with self._lock:
            buffer = self._arrays.pop(name, None)
            if buffer is None:
                return
            self._used -= buffer.nbytes
        self._buffers.give(buffer)
