"""Shards packed by a Ray cluster of two nodes on this machine: the same bytes, whoever is killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import streamed
from tests.planning import plan_for
from tests.streamed import files, hidden
from tests.tiny import make_mxfp4_source, make_tiny
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Silent
from toolchain.plan.types import Plan
from toolchain.quantize.streaming import outline
from toolchain.quantize.streaming.datafree import quantize_stream
from toolchain.quantize.streaming.executor import ExecutorOptions

ray = pytest.importorskip("ray")

Tiny = Callable[[str], Path]
ON_RAY = ExecutorOptions(name="ray")
LOOPBACK = "127.0.0.2"
"""Ray takes 127.0.0.1 for the machine's address in its network, where these clusters do not listen."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, to which this process is connected."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_BACKEND_LOG_LEVEL": "error",
        "RAY_health_check_period_ms": "500",
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.cluster_utils import Cluster

        temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # noqa: S108  sockets have short paths
        head = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        made = Cluster(initialize_head=True, head_node_args={**node(), **head, "temp_dir": temporary})
        made.add_node(**node())
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            shutil.rmtree(temporary, ignore_errors=True)


def node() -> dict[str, Any]:
    return {"num_cpus": 1, "node_ip_address": LOOPBACK}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed.small_shards(monkeypatch)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 MB: packing a shard of it takes long enough to be disturbed."""
    sizes = dict(hidden_size=512, moe_intermediate_size=512, num_experts=16)
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("wide") / "model", **sizes)


def spread(plan: Plan, output: Path, **options: Any) -> dict[str, Any]:
    return quantize_stream(plan, output, executor=ON_RAY, **options)


def alone(plan: Plan, output: Path) -> dict[str, Any]:
    return quantize_stream(plan, output, device="cpu")


def test_the_same_files_as_in_one_process(
    cluster: Any, tiny: Tiny, tmp_path: Path, small_shards: None
) -> None:
    """q, k and v, gate and up lie in different shards, which different workers write."""
    plan = plan_for(tiny("qwen3_moe"), "nvfp4", recipe="window+pinned", policy="all-linear")
    alone(plan, tmp_path / "alone")
    manifest = spread(plan, tmp_path / "spread")
    assert files(tmp_path / "spread") == files(tmp_path / "alone")
    assert hidden(tmp_path) == []
    assert manifest["executor"]["name"] == "ray" and manifest["executor"]["nodes"] == 2
    assert manifest["device"] == "cpu"


def test_what_workers_count_is_in_the_manifest(
    cluster: Any, tiny: Tiny, tmp_path: Path, small_shards: None
) -> None:
    source = make_mxfp4_source(tiny("gpt_oss"), tmp_path / "source")
    plan = plan_for(source, "w4a16_nvfp4")
    expected = alone(plan, tmp_path / "alone")
    manifest = spread(plan, tmp_path / "spread")
    assert files(tmp_path / "spread") == files(tmp_path / "alone")
    assert manifest["source_numbers"] == expected["source_numbers"]


class Bar(Silent):
    """Remembers what was shown."""

    def __init__(self) -> None:
        self.total, self.counts = 0, list[int]()

    @contextmanager
    def meter(self, *, description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        self.total = total_bytes
        yield self.counts.append


def writers(output: Path) -> list[int]:
    """Processes that have a shard of ``output`` open."""
    found = []
    within = str(output.parent / f".{output.name}.streaming" / "attempts")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(path.startswith(within) for path in opened):
            found.append(int(process.name))
    return found


@contextmanager
def disturbed(output: Path, act: Callable[[int], bool]) -> Iterator[list[int]]:
    """``act`` is called with a process that is in the middle of a shard, until it says that it did something."""
    over, hit = threading.Event(), list[int]()

    def watch() -> None:
        while not over.is_set() and not hit:
            for process in writers(output):
                if not hit and act(process):
                    hit.append(process)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield hit
    finally:
        over.set()
        thread.join()


def kill(process: int) -> bool:
    os.kill(process, signal.SIGKILL)
    return True


def medium_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {**outline.make_outline.__kwdefaults__, "shard_bytes": 1_500_000}
    monkeypatch.setattr(outline.make_outline, "__kwdefaults__", defaults)


@pytest.fixture
def undisturbed(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, dict[str, bytes]]:
    """A plan of about ten shards, and the files that it gives."""
    medium_shards(monkeypatch)
    plan = plan_for(wide, "w4a16_nvfp4", recipe="window")
    alone(plan, tmp_path / "undisturbed")
    return plan, files(tmp_path / "undisturbed")


def test_a_worker_killed_in_the_middle_of_a_shard(
    cluster: Any, undisturbed: tuple[Plan, dict[str, bytes]], tmp_path: Path
) -> None:
    plan, expected = undisturbed
    bar = Bar()
    with disturbed(tmp_path / "out", kill) as hit:
        spread(plan, tmp_path / "out", progress=bar)
    assert hit, "a worker was killed"
    assert files(tmp_path / "out") == expected and hidden(tmp_path) == []
    assert sum(bar.counts) == bar.total


def test_a_node_lost_in_the_middle_of_a_shard(
    cluster: Any, undisturbed: tuple[Plan, dict[str, bytes]], tmp_path: Path
) -> None:
    plan, expected = undisturbed
    lost = next(iter(cluster.worker_nodes))
    raylet = lost.all_processes["raylet"][0].process.pid

    def remove(process: int) -> bool:
        import psutil

        if raylet not in [parent.pid for parent in psutil.Process(process).parents()]:
            return False
        os.kill(raylet, signal.SIGKILL)
        return kill(process)

    with disturbed(tmp_path / "out", remove) as hit:
        spread(plan, tmp_path / "out")
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(**node())
    assert hit, "a node was lost"
    assert files(tmp_path / "out") == expected and hidden(tmp_path) == []
