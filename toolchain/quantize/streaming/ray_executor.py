"""Packing by the workers of a Ray cluster: a shard is a task, which Ray runs again when its worker or node is lost.

Workers write under names of their own (``worker.py``); the journal is written here alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress
from toolchain.quantize.streaming.datafree import Source
from toolchain.quantize.streaming.executor import Pieces, Written
from toolchain.quantize.streaming.journal import Journal
from toolchain.quantize.streaming.outline import Shard
from toolchain.quantize.streaming.ray_cluster import alive_nodes, require_cpus, require_device, slots
from toolchain.quantize.streaming.ray_pieces import ray_pieces
from toolchain.quantize.streaming.ray_tasks import attempts_of, outcome, remote
from toolchain.quantize.streaming.shards import total_bytes
from toolchain.quantize.streaming.worker import Made, make_work, told_name, write

AHEAD = 2
"""Tasks per slot of the cluster that Ray knows of: one works, one waits."""
POLL_S = 0.5


class RayExecutor:
    """An ``Executor`` (``executor.py``) on the cluster that ``ray`` is connected to."""

    def __init__(self, ray: Any, *, device: str = "auto", cpus: int | None = None) -> None:
        """Errors as ``require_device`` and ``require_cpus``."""
        self._ray, self._cpus = ray, cpus
        self.device = require_device(ray, device)
        require_cpus(ray, cpus)
        about = {"name": "ray", "version": ray.__version__, "nodes": len(alive_nodes(ray))}
        self.about: dict[str, Any] = {"executor": about}

    def write_shards(
        self, source: Source, todo: list[Shard], journal: Journal, *, progress: Progress
    ) -> Written:
        cpus, gpus = self._cpus or self._share(len(todo)), int(self.device == "cuda")
        with (
            attempts_of(journal) as attempts,
            progress.meter(description="quantize", total_bytes=total_bytes(todo)) as done,
        ):
            work = make_work(source, journal, attempts, device=self.device, threads=cpus)
            task = remote(self._ray, write, cpus=cpus, gpus=gpus)
            run = _Run(self._ray, task, self._ray.put(work), attempts, journal, done)
            run.all(todo, lambda: slots(self._ray, cpus, gpus))
        own = {"cpus_per_task": cpus, "worker_peak_memory_bytes": run.peak}
        return Written(
            hashes=run.hashes, cast=run.cast, details={"executor": {**self.about["executor"], **own}}
        )

    def pieces(self, source: Source, journal: Journal) -> AbstractContextManager[Pieces]:
        return ray_pieces(self._ray, source, journal, cpus=self._cpus or 1)

    def _share(self, shards: int) -> int:
        """CPUs of a task, so that few shards use the whole cluster, too; it must fit on the smallest node."""
        counts = [int(node["CPU"]) for node in alive_nodes(self._ray) if node.get("CPU", 0) >= 1]
        return max(1, min(min(counts, default=1), sum(counts) // max(1, shards)))


class _Run:
    """The tasks of one call, and what came of them."""

    def __init__(
        self,
        ray: Any,
        task: Any,
        work: Any,
        attempts: Path,
        journal: Journal,
        done: Callable[[int], None],
    ) -> None:
        self._ray, self._task, self._work = ray, task, work
        self._attempts, self._journal, self._done = attempts, journal, done
        self._running: dict[Any, Shard] = {}
        self._told: dict[str, int] = {}
        self.hashes: dict[str, str] = {}
        self.cast: dict[str, dict[str, int]] = {}
        self.peak = 0
        """Largest resident set of any worker, bytes."""

    def all(self, todo: list[Shard], at_once: Callable[[], int]) -> None:
        """``at_once``: tasks that the cluster could run now; asked again and again, since nodes come and go."""
        waiting = deque(todo)
        try:
            while waiting or self._running:
                most = AHEAD * max(1, at_once())
                while waiting and len(self._running) < most:
                    shard = waiting.popleft()
                    self._running[self._task.remote(self._work, shard.file)] = shard
                ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
                for ref in ready:
                    shard = self._running.pop(ref)
                    self._finish(shard, outcome(self._ray, ref, shard.file))
                    self._tell(shard, total_bytes([shard]))
                for shard in self._running.values():
                    self._tell(shard, self._said(shard))
        finally:
            for ref in self._running:  # only after a failure
                self._ray.cancel(ref, force=True)

    def _finish(self, shard: Shard, made: Made) -> None:
        path = self._attempts / made.attempt
        if not path.is_file() or path.stat().st_size != made.bytes:
            raise ToolchainError(
                f"{shard.file} was written by a worker, but {path} is not here or has not its {made.bytes} bytes",
                hint="put the output on storage that every node has under the same path",
                code="TC-238",
            )
        path.replace(self._journal.partial(shard.file))
        self._journal.finish(shard.file, made.sha256)
        self.hashes[shard.file] = made.sha256
        self.cast |= made.cast
        self.peak = max(self.peak, made.peak_memory_bytes)

    def _said(self, shard: Shard) -> int:
        """Bytes of ``shard`` that its worker says are written."""
        path = self._attempts / told_name(shard.file)
        text = path.read_text(encoding="ascii") if path.is_file() else ""
        return int(text) if text.isdigit() else 0

    def _tell(self, shard: Shard, count: int) -> None:
        """Less than before when it began again on another worker."""
        before = self._told.get(shard.file, 0)
        if count != before:
            self._told[shard.file] = count
            self._done(count - before)
