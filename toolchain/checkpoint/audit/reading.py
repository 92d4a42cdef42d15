"""Read a shard once, from beginning to end, at the price of the disk.

What is not in memory already is read past the page cache (O_DIRECT) where the file system can: copying 60 GB through
the cache costs more processor time than checking it, and throws out what others have there. The rest is read as usual.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np

from toolchain.checkpoint.audit.codes import Bytes
from toolchain.core.errors import ToolchainError

ALIGNMENT = 4096
"""Offsets, sizes and addresses of direct reads are multiples of this: the block size of today's disks, or more."""


class Buffer:
    """Page-aligned memory for reads of up to ``size`` bytes at any offset; one per thread, reused."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size + 2 * ALIGNMENT)
        self.bytes: Bytes = np.frombuffer(self.memory, dtype=np.uint8)


class ShardFile:
    """An open shard. ``read`` fills a buffer; with ``direct`` past the page cache, unless its pages are there."""

    def __init__(self, path: Path, *, probe: tuple[int, ...] = ()) -> None:
        """``probe``: offsets whose presence in memory decides for all."""
        self._path = path
        self._handle = os.open(path, os.O_RDONLY)
        self._direct = -1
        if probe and hasattr(os, "O_DIRECT") and not self._is_cached(probe):
            with contextlib.suppress(OSError):  # tmpfs and some network file systems have no such thing
                self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)
        if self._direct >= 0:
            os.close(self._direct)

    def _is_cached(self, probe: tuple[int, ...]) -> bool:
        """True when the bytes at all offsets are in memory; asking reads nothing."""
        if not hasattr(os, "RWF_NOWAIT"):
            return True
        os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            return all(os.preadv(self._handle, [bytearray(1)], at, os.RWF_NOWAIT) == 1 for at in probe)
        except OSError:
            return False
        finally:
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, buffer: Buffer, start: int, size: int) -> Bytes:
        """``size`` bytes from ``start``, in ``buffer``. ToolchainError TC-015 when the file ends before."""
        if self._direct >= 0:
            first = start // ALIGNMENT * ALIGNMENT
            last = -(-(start + size) // ALIGNMENT) * ALIGNMENT
            try:
                got = self._fill(self._direct, buffer, first, last - first)
            except OSError:
                got = 0  # opened, but not readable so: as usual, then
            if got >= start + size - first:
                return buffer.bytes[start - first : start - first + size]
        got = self._fill(self._handle, buffer, start, size)
        if got < size:
            raise ToolchainError(
                f"{self._path.name} ends at byte {start + got}, its header promises {start + size} or more",
                hint="it was changed while it was read: fetch this shard again",
                code="TC-015",
            )
        return buffer.bytes[:size]

    def _fill(self, handle: int, buffer: Buffer, start: int, size: int) -> int:
        """Bytes read; fewer than ``size`` only at the end of the file."""
        done = 0
        while done < size:
            count = os.preadv(handle, [memoryview(buffer.memory)[done:size]], start + done)
            done += count
            # A direct read ends off the alignment at the end of the file, and cannot go on from there.
            if count == 0 or (handle == self._direct and count % ALIGNMENT):
                break
        return done
