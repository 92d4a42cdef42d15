"""Packing by the workers of a Ray cluster: a shard is a task, which Ray runs again when its worker or node is lost.

Workers write under names of their own (``worker.py``); the journal is written here alone.
"""

from __future__ import annotations

import shutil
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from uuid import uuid4

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Progress
from toolchain.quantize.streaming.datafree import Source, named_dtype
from toolchain.quantize.streaming.executor import PackJob, Written
from toolchain.quantize.streaming.journal import Journal
from toolchain.quantize.streaming.outline import Shard
from toolchain.quantize.streaming.ray_cluster import alive_nodes
from toolchain.quantize.streaming.shards import total_bytes
from toolchain.quantize.streaming.worker import ATTEMPTS, Made, Work, make_work, pack, told_name, write

RETRIES = 5
"""Times that a task begins again after its worker died: nodes come and go, but memory that is short stays short."""
AHEAD = 2
"""Tasks per slot of the cluster that Ray knows of: one works, one waits."""
POLL_S = 0.5


class RayExecutor:
    """An ``Executor`` (``executor.py``) on the cluster that ``ray`` is connected to."""

    def __init__(self, ray: Any, *, device: str = "auto", cpus: int | None = None) -> None:
        """``device``: auto is CUDA where a node of the cluster has GPUs, which then do all the work. UsageError TC-236
        for one that the cluster has not, or for more ``cpus`` than a node has."""
        self._ray, self._cpus = ray, cpus
        nodes = alive_nodes(ray)
        gpus = sum(node.get("GPU", 0) for node in nodes)
        if device == "auto":
            device = "cuda" if gpus else "cpu"
        if device not in ("cpu", "cuda") or (device == "cuda" and not gpus):
            raise UsageError(
                f"--device {device} with --executor ray: the cluster has {gpus:g} GPUs, and Ray gives them out",
                hint="use --device cpu, cuda or auto",
                code="TC-236",
            )
        largest = max((node.get("CPU", 0) for node in nodes), default=0)
        if cpus is not None and largest and cpus > largest:
            raise UsageError(
                f"--ray-cpus {cpus}: the largest node has {largest:g} CPUs, so no task would ever start",
                code="TC-236",
            )
        self.device = device
        self._works: list[tuple[Source, Any]] = []

    def write_shards(
        self, source: Source, todo: list[Shard], journal: Journal, *, progress: Progress
    ) -> Written:
        cpus = self._task_cpus(len(todo))
        attempts = journal.root / ATTEMPTS / uuid4().hex
        shutil.rmtree(attempts.parent, ignore_errors=True)  # of a driver that was killed
        attempts.mkdir(parents=True)
        work = self._ray.put(self._work(source, journal, attempts, cpus))
        run = _Run(self._ray, self._remote(write, cpus), work, attempts, journal)
        try:
            with progress.meter(description="quantize", total_bytes=total_bytes(todo)) as done:
                run.all(todo, self._slots, cpus, done)
        finally:
            run.cancel()
            shutil.rmtree(attempts.parent, ignore_errors=True)
        details = {
            "executor": {
                "name": "ray",
                "nodes": len(alive_nodes(self._ray)),
                "cpus_per_task": cpus,
                "peak_memory_bytes": run.peak,
            }
        }
        return Written(hashes=run.hashes, cast=run.cast, details=details)

    def submit(self, source: Source, journal: Journal, job: PackJob) -> Future[int]:
        ref = next((ref for known, ref in self._works if known is source), None)
        if ref is None:
            ref = self._ray.put(self._work(source, journal, journal.content, self._cpus or 1))
            self._works.append((source, ref))
        return self._remote(pack, self._cpus or 1).remote(ref, job).future()

    def _work(self, source: Source, journal: Journal, attempts: Path, cpus: int) -> Work:
        dtype = named_dtype(source.directory)
        return make_work(source, journal, attempts, dtype=dtype, device=self.device, threads=cpus)

    def _remote(self, function: Any, cpus: int) -> Any:
        return self._ray.remote(function).options(
            num_cpus=cpus,
            num_gpus=1 if self.device == "cuda" else 0,
            max_retries=RETRIES,
            scheduling_strategy="SPREAD",
        )

    def _task_cpus(self, shards: int) -> int:
        """So that all work on the last shard, too; a task must fit on the smallest node that has CPUs."""
        if self._cpus is not None:
            return self._cpus
        counts = [int(node["CPU"]) for node in alive_nodes(self._ray) if node.get("CPU", 0) >= 1]
        return max(1, min(min(counts, default=1), sum(counts) // max(1, shards)))

    def _slots(self, cpus: int) -> int:
        """Tasks at once on the cluster as it is now: nodes may join or leave."""
        nodes = alive_nodes(self._ray)
        if self.device == "cuda":
            return sum(int(min(node.get("GPU", 0), node.get("CPU", 0) // cpus)) for node in nodes)
        return sum(int(node.get("CPU", 0) // cpus) for node in nodes)


class _Run:
    """The tasks of one call, and what came of them."""

    def __init__(self, ray: Any, task: Any, work: Any, attempts: Path, journal: Journal) -> None:
        self._ray, self._task, self._work = ray, task, work
        self._attempts, self._journal = attempts, journal
        self._running: dict[Any, Shard] = {}
        self._told: dict[str, int] = {}
        self.hashes: dict[str, str] = {}
        self.cast: dict[str, dict[str, int]] = {}
        self.peak = 0

    def all(self, todo: list[Shard], slots: Any, cpus: int, done: Any) -> None:
        waiting = deque(todo)
        while waiting or self._running:
            while waiting and len(self._running) < AHEAD * max(1, slots(cpus)):
                shard = waiting.popleft()
                self._running[self._task.remote(self._work, shard.file)] = shard
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
            for ref in ready:
                shard = self._running.pop(ref)
                self._finish(shard, self._result(ref, shard))
                self._tell(shard, total_bytes([shard]), done)
            for shard in self._running.values():
                self._tell(shard, self._said(shard), done)

    def cancel(self) -> None:
        """Those that still run, after a failure: their workers end."""
        for ref in self._running:
            self._ray.cancel(ref, force=True)
        self._running.clear()

    def _finish(self, shard: Shard, made: Made) -> None:
        path = self._attempts / made.attempt
        if not path.is_file() or path.stat().st_size != made.bytes:
            raise ToolchainError(
                f"{shard.file} was written by a worker, but {path} is not here or not of {made.bytes} bytes",
                hint="put the output on storage that every node has under the same path",
                code="TC-238",
            )
        path.replace(self._journal.partial(shard.file))
        self._journal.finish(shard.file, made.sha256)
        self.hashes[shard.file] = made.sha256
        self.cast |= made.cast
        self.peak = max(self.peak, made.peak_memory_bytes)

    def _result(self, ref: Any, shard: Shard) -> Made:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, ToolchainError):
                cause = error.cause
                raise type(cause)(
                    f"{shard.file}: {cause.message}", hint=cause.hint, code=cause.code
                ) from error
            if isinstance(error.cause, ImportError):
                raise _without_code(error.cause) from error
            raise _lost(shard, str(error.cause)) from error
        except exceptions.RayError as error:
            raise _lost(shard, f"{type(error).__name__}, {RETRIES} times begun again") from error

    def _said(self, shard: Shard) -> int:
        """Bytes of ``shard`` that its worker says are written."""
        path = self._attempts / told_name(shard.file)
        text = path.read_text(encoding="ascii") if path.is_file() else ""
        return int(text) if text.isdigit() else 0

    def _tell(self, shard: Shard, count: int, done: Any) -> None:
        """Less than before when it began again on another worker."""
        before = self._told.get(shard.file, 0)
        if count != before:
            self._told[shard.file] = count
            done(count - before)


def _without_code(error: ImportError) -> ToolchainError:
    return ToolchainError(
        f"a node of the cluster has not the packages of this run: {error}",
        hint="install the same toolchain on every node",
        code="TC-238",
    )


def _lost(shard: Shard, reason: str) -> ToolchainError:
    return ToolchainError(
        f"{shard.file} could not be made: {reason}",
        hint="`ray status` and the logs of its nodes say why; run the same command again: what is finished is kept",
        code="TC-239",
    )
