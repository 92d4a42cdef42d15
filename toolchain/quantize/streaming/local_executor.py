"""Packing by threads of this process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from toolchain.core.progress import Progress
from toolchain.modeling.loading import pick_device
from toolchain.quantize.streaming.datafree import Source, make_packer
from toolchain.quantize.streaming.executor import Written
from toolchain.quantize.streaming.journal import Journal
from toolchain.quantize.streaming.outline import Shard
from toolchain.quantize.streaming.shards import write_shards


class LocalExecutor:
    """An ``Executor`` (``executor.py``)."""

    def __init__(self, device: str = "auto", threads: int | None = None) -> None:
        self._device, self._threads = pick_device(device), threads
        self.device = str(self._device)
        self.about: dict[str, Any] = {}

    def write_shards(
        self, source: Source, todo: list[Shard], journal: Journal, *, progress: Progress
    ) -> Written:
        packer = make_packer(source, self._device)
        hashes = write_shards(packer, todo, journal, threads=self._threads, progress=progress)
        return Written(hashes=hashes, cast=packer.cast)

    def pieces(self, source: Source, journal: Journal) -> AbstractContextManager[None]:
        return nullcontext()
