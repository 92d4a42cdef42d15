"""Cells on a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.sweeps import make_root, rows, write_spec
from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Silent
from toolchain.pipeline.sweep.executors import Ended, Job
from toolchain.pipeline.sweep.ray_cells import RayCells

Run = Callable[..., Ran]
ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def root(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tiny("qwen3_moe"), tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def address(alone_with_ray: None) -> Iterator[str]:
    """Two nodes of one CPU each, on the loopback interface; without dashboard and telemetry."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
        node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 1024**2}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        cluster.add_node(**node)
        try:
            yield cluster.address
        finally:
            cluster.shutdown()


def job(name: str, code: str, directory: Path) -> Job:
    command = ("/where/the/driver/has/it/python", "-c", f"import os, sys; {code}")
    return Job(name=name, command=command, log=Path(f"{name}.log"), directory=directory)


def test_each_cell_has_a_node_and_dies_alone(address: str, tmp_path: Path) -> None:
    """The first two wait for each other: they end only when they run at the same time."""
    meet = (
        "import time; open({!r}, 'w'); start = time.time()\n"
        "while not os.path.exists({!r}):\n"
        "    time.sleep(0.05); assert time.time() - start < 60"
    )
    jobs = [
        job("one", meet.format("one", "two"), tmp_path),
        job("two", meet.format("two", "one"), tmp_path),
        job("killed", "os.kill(os.getpid(), 9)", tmp_path),
        job("failing", "sys.exit('not today')", tmp_path),
        job("told", "print(sys.executable, file=sys.stderr)", tmp_path),
    ]
    found: dict[str, Ended] = {
        ended.name: ended for ended in RayCells(address=address, cpus=1).run(jobs, Silent())
    }
    assert {name: ended.status for name, ended in found.items()} == {
        "one": 0,
        "two": 0,
        "killed": -9,
        "failing": 1,
        "told": 0,
    }
    assert found["failing"].last_words == "not today"
    assert (tmp_path / "told.log").read_text().strip() == sys.executable


def test_a_sweep_on_the_cluster(
    address: str,
    root: Path,
    tmp_path: Path,
    toolchain: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Relative paths mean what they mean where the sweep was started."""
    monkeypatch.chdir(root)
    spec = write_spec(root, "cluster", formats=["w4a16_nvfp4"], recipes=["max"], models=["model"])
    asked = ("--executor", "ray", "--ray-address", address, "--until", "quantize", "--json")
    ran = toolchain("sweep", spec.name, "--output", os.path.relpath(tmp_path / "sweep"), *asked)
    assert ran.status == 0, ran.err
    found = rows(ran.json)
    assert set(found) == {"model-w4a16_nvfp4-max"}
    assert {row["state"] for row in found.values()} == {"finished"}
    assert all(row["bytes"] > 0 for row in found.values())


def test_a_cell_that_no_node_can_hold(address: str, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="--ray-cpus 64: the largest node has 1 CPUs"):
        list(RayCells(address=address, cpus=64).run([job("big", "", tmp_path)], Silent()))


def test_options_of_ray_without_ray(root: Path, tmp_path: Path, toolchain: Run) -> None:
    ran = toolchain(
        "sweep", write_spec(root, "local"), "--ray-cpus", 2, "--output", tmp_path / "sweep", "--json"
    )
    assert ran.status == 2 and ran.json["error"]["code"] == "TC-236"
