"""Write the shards of an outline, tensors in parallel; each is hashed and recorded while the next is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from os import sched_getaffinity
from pathlib import Path

import torch

from toolchain.checkpoint.shard_file import ShardFile
from toolchain.core.files import sha256_file
from toolchain.core.progress import Progress
from toolchain.quantize.streaming.journal import Journal
from toolchain.quantize.streaming.outline import Item, Shard
from toolchain.quantize.streaming.pack import Packer
from toolchain.quantize.streaming.rows import Rows

AHEAD = 2
"""Items per thread that are handed out before they are worked on."""
READ_AHEAD_BYTES = 64 << 20
"""Of the source, that the kernel is asked to fetch before it is needed: a disk is fast when it is never idle."""
Done = Callable[[int], None]


def write_shard(packer: Packer, shard: Shard, path: Path, pool: ThreadPoolExecutor, done: Done) -> None:
    """All tensors of ``shard`` into ``path``, flushed to the disk. ``done`` is called with the bytes of each item."""
    fill_shard(packer, shard, path, pool, done).close()


def fill_shard(packer: Packer, shard: Shard, path: Path, pool: ThreadPoolExecutor, done: Done) -> ShardFile:
    """The same, not flushed yet."""
    file = ShardFile(path, shard.outputs)
    try:
        waiting: set[Future[None]] = set()
        ahead = AHEAD * pool._max_workers
        for item in announced(packer.rows, shard.items):
            if len(waiting) >= ahead:
                waiting = _settle(waiting)
            waiting.add(pool.submit(_write_item, packer.rows, packer, item, file, done))
        while waiting:
            waiting = _settle(waiting)
    except BaseException:
        for future in waiting:
            future.cancel()
        wait(waiting)
        file.abandon()
        path.unlink(missing_ok=True)
        raise
    return file


def _settle(waiting: set[Future[None]]) -> set[Future[None]]:
    finished, left = wait(waiting, return_when=FIRST_COMPLETED)
    for future in finished:
        future.result()
    return left


def _write_item(rows: Rows, packer: Packer, item: Item, file: ShardFile, done: Done) -> None:
    packer.write(item, file)
    for name in rows.stored_names(item.name):
        rows.forget(name)
    done(sum(spec.bytes for spec in item.outputs if spec.name in file.specs))


def announced(rows: Rows, items: Sequence[Item]) -> Iterator[Item]:
    """``items``, each some way behind the point up to which the kernel was asked to fetch the source."""
    waiting: deque[tuple[Item, int]] = deque()
    ahead = 0
    for item in items:
        names = rows.stored_names(item.name)
        for name in names:
            rows.announce(name)
        size = sum(rows.info(name).bytes for name in names)
        waiting.append((item, size))
        ahead += size
        while ahead > READ_AHEAD_BYTES:
            item, size = waiting.popleft()
            ahead -= size
            yield item
    for item, _ in waiting:
        yield item


def write_shards(
    packer: Packer, todo: list[Shard], journal: Journal, *, threads: int | None, progress: Progress
) -> dict[str, str]:
    """File name -> hash of the shards of ``todo``, finished in ``journal``. ``threads`` None: one per core."""
    hashes: dict[str, str] = {}
    count = threads or len(sched_getaffinity(0))

    def seal(shard: Shard, file: ShardFile) -> None:
        flushed = flusher.submit(file.close)  # the disk writes while the hash is computed
        digest = sha256_file(journal.partial(shard.file))
        flushed.result()
        journal.finish(shard.file, digest)
        hashes[shard.file] = digest

    with (
        one_thread_each(),
        ThreadPoolExecutor(count, thread_name_prefix="pack") as pool,
        ThreadPoolExecutor(1, thread_name_prefix="flush") as flusher,
        ThreadPoolExecutor(1, thread_name_prefix="hash") as sealer,
        progress.meter(description="quantize", total_bytes=total_bytes(todo)) as done,
    ):
        sealing: Future[None] | None = None
        for shard in todo:
            file = fill_shard(packer, shard, journal.partial(shard.file), pool, done)
            if sealing is not None:
                sealing.result()
            sealing = sealer.submit(seal, shard, file)
        if sealing is not None:
            sealing.result()
    return hashes


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Threads are over tensors here: within an operation, more of them would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def total_bytes(shards: list[Shard]) -> int:
    return sum(spec.bytes for shard in shards for spec in shard.outputs)
