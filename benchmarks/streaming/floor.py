"""What the disk takes on its own: read a checkpoint and write a file as large as its quantization, computing nothing.

    python benchmarks/streaming/floor.py SOURCE OUTPUT BYTES

The access pattern is that of the toolchain: a thread per core, reads by position of a few megabytes with the kernel
reading ahead, writes by position into a file of known size, one flush at the end, pages given back. No imports beyond
the standard library: start-up is nothing.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 4 << 20
AHEAD = 64 << 20


def main() -> None:
    source, output, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    files = sorted(source.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    target = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    if size:
        os.posix_fallocate(target, 0, size)
    local = threading.local()
    written = [0]
    lock = threading.Lock()

    def move(descriptor: int, start: int, length: int) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(os.urandom(CHUNK))
        os.posix_fadvise(descriptor, start + AHEAD, CHUNK, os.POSIX_FADV_WILLNEED)
        count = os.preadv(descriptor, [memoryview(local.buffer)[:length]], start)
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
        with lock:
            at, part = written[0], min(size - written[0], -(-count * size // total))
            written[0] += max(part, 0)
        if part > 0:
            os.pwrite(target, memoryview(local.buffer)[:part], at)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            length = path.stat().st_size
            parts = [
                pool.submit(move, descriptor, at, min(CHUNK, length - at)) for at in range(0, length, CHUNK)
            ]
            for part in parts:
                part.result()
            os.close(descriptor)
    os.fsync(target)
    os.close(target)


if __name__ == "__main__":
    main()
