"""Cells on the nodes of a Ray cluster, each on a whole node, on storage that all of them share."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.progress import Progress, Silent
from toolchain.pipeline.sweep.executors import Ended, Job, run_job
from toolchain.quantize.streaming.ray_cluster import alive_nodes, connected

RETRIES = 5
"""Times that a cell begins again after its node was lost; its stages go on where they were."""


@dataclass(frozen=True, kw_only=True)
class RayCells:
    """A ``CellExecutor``. Errors of ``connected``; UsageError TC-236 for more CPUs than a node has."""

    address: str | None = None
    """``host:port`` of the head; None: RAY_ADDRESS, or a cluster that runs on this machine."""
    cpus: int | None = None
    """CPUs of a cell; None: all of the smallest node, and its GPUs: cells do not share a machine's memory."""

    def run(self, jobs: Sequence[Job], progress: Progress) -> Generator[Ended, None, None]:
        with connected(self.address) as ray:
            task = ray.remote(on_node).options(
                **self._share(alive_nodes(ray)), max_retries=RETRIES, scheduling_strategy="SPREAD"
            )
            running = {task.remote(job): job for job in jobs}
            try:
                while running:
                    ready, _ = ray.wait(list(running), num_returns=1)
                    for ref in ready:
                        yield _ended(ray, ref, running.pop(ref))
            finally:
                for ref in running:
                    ray.cancel(ref, force=True)

    def _share(self, nodes: list[dict[str, float]]) -> dict[str, int]:
        """What one cell takes of a node."""
        usable = [node for node in nodes if node.get("CPU", 0) >= 1]
        largest = max((int(node["CPU"]) for node in usable), default=0)
        if not usable or (self.cpus or 1) > largest:
            raise UsageError(
                f"--ray-cpus {self.cpus or 1}: the largest node has {largest} CPUs, so no cell would ever start",
                hint="`ray status` shows the nodes",
                code="TC-236",
            )
        with_gpus = [node for node in usable if node.get("GPU", 0) >= 1]
        gpus = min((int(node["GPU"]) for node in with_gpus), default=0)
        return {
            "num_cpus": self.cpus or min(int(node["CPU"]) for node in with_gpus or usable),
            "num_gpus": gpus,
        }


def on_node(job: Job) -> Ended:
    """Run on a worker: its process, with the interpreter of that node."""
    return run_job(replace(job, command=(sys.executable, *job.command[1:])), Silent())


def _ended(ray: Any, ref: Any, job: Job) -> Ended:
    try:
        found: Ended = ray.get(ref)
    except ray.exceptions.RayError as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        return Ended(name=job.name, status=1, last_words=f"{type(error).__name__}: {words[-1]}")
    return found
