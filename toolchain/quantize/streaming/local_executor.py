"""Packing by threads of this process."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from toolchain.core.progress import Progress
from toolchain.modeling.loading import pick_device
from toolchain.quantize.streaming.datafree import Source, make_packer
from toolchain.quantize.streaming.executor import PackJob, Written
from toolchain.quantize.streaming.journal import Journal
from toolchain.quantize.streaming.outline import Shard
from toolchain.quantize.streaming.pack import Packer
from toolchain.quantize.streaming.shards import pack_into, write_shards


class LocalExecutor:
    """An ``Executor`` (``executor.py``)."""

    def __init__(self, device: str = "auto", threads: int | None = None) -> None:
        self._device, self._threads = pick_device(device), threads
        self.device = str(self._device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pack-layer")
        self._packer: tuple[Source, Packer] | None = None

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def write_shards(
        self, source: Source, todo: list[Shard], journal: Journal, *, progress: Progress
    ) -> Written:
        packer = make_packer(source, self._device)
        hashes = write_shards(packer, todo, journal, threads=self._threads, progress=progress)
        return Written(hashes=hashes, cast=packer.cast)

    def submit(self, source: Source, journal: Journal, job: PackJob) -> Future[int]:
        if self._packer is None or self._packer[0] is not source:
            self._packer = (source, make_packer(source, self._device))
        return self._pool.submit(pack_into, self._packer[1], job)
