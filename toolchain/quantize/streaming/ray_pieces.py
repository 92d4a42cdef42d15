"""Parts of calibrated layers, packed by workers of a Ray cluster while the rest of the layer is packed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain.quantize.streaming.datafree import Source
from toolchain.quantize.streaming.executor import PackJob
from toolchain.quantize.streaming.journal import Journal
from toolchain.quantize.streaming.ray_tasks import attempts_of, outcome, remote
from toolchain.quantize.streaming.worker import make_work, pack


@contextmanager
def ray_pieces(ray: Any, source: Source, journal: Journal, *, cpus: int) -> Iterator[RayPieces]:
    """``cpus``: of one task. On CPUs only: GPUs are for calibration."""
    with attempts_of(journal) as attempts:
        work = make_work(source, journal, attempts, device="cpu", threads=cpus)
        yield RayPieces(ray, remote(ray, pack, cpus=cpus), ray.put(work), attempts)


class RayPieces:
    """``Pieces`` (``executor.py``)."""

    def __init__(self, ray: Any, task: Any, work: Any, attempts: Path) -> None:
        self._ray, self._task, self._work, self._attempts = ray, task, work, attempts

    def begin(self, jobs: Sequence[PackJob]) -> Iterator[tuple[PackJob, Path]]:
        return self._finished({self._task.remote(self._work, job): job for job in jobs})

    def _finished(self, running: dict[Any, PackJob]) -> Iterator[tuple[PackJob, Path]]:
        try:
            while running:
                ready, _ = self._ray.wait(list(running), num_returns=1)
                for ref in ready:
                    job = running.pop(ref)
                    yield job, self._attempts / outcome(self._ray, ref, f"{job.names[0]} ...")
        finally:
            for ref in running:  # only after a failure
                self._ray.cancel(ref, force=True)
