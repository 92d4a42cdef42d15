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
from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Silent
from toolchain.plan.types import Plan
from toolchain.quantize.job import quantize
from toolchain.quantize.streaming import outline
from toolchain.quantize.streaming.datafree import quantize_stream
from toolchain.quantize.streaming.executor import ExecutorOptions

ray = pytest.importorskip("ray")

Tiny = Callable[[str], Path]
ON_RAY = ExecutorOptions(name="ray")
LOOPBACK = "127.0.0.2"
"""Ray takes 127.0.0.1 for the machine's address in its network, where these clusters do not listen."""


@pytest.fixture(scope="module")
def cluster(alone_with_ray: None) -> Iterator[Any]:
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

        # With a directory of its own for the rest, Ray still writes a file there, and does not make it.
        (Path(tempfile.gettempdir()) / "ray").mkdir(exist_ok=True)
        temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets have paths of 107 bytes
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
    return quantize_stream(plan, output, **{"executor": ON_RAY, **options})


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
            opened = [str(link.readlink()) for link in (process / "fd").iterdir()]
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


DRIVER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from toolchain.core.files import read_json
from toolchain.plan.types import Plan
from toolchain.quantize.streaming import outline
from toolchain.quantize.streaming.datafree import quantize_stream
from toolchain.quantize.streaming.executor import ExecutorOptions
outline.make_outline.__kwdefaults__["shard_bytes"] = 1_500_000
plan = Plan.from_json(read_json(Path({plan!r})))
quantize_stream(plan, Path({out!r}), executor=ExecutorOptions(name="ray", ray_address={address!r}))
"""


def test_a_run_whose_driver_was_killed_goes_on_in_one_process(
    cluster: Any, undisturbed: tuple[Plan, dict[str, bytes]], tmp_path: Path
) -> None:
    """And the other way round: what was begun in one process goes on with Ray."""
    plan, expected = undisturbed
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    values = {"root": str(Path(__file__).parent.parent), "plan": str(tmp_path / "plan.json")}
    script = DRIVER.format(**values, out=str(tmp_path / "out"), address=cluster.address)
    finished = tmp_path / ".out.streaming" / "finished"
    driver = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stderr=subprocess.PIPE)
    while driver.poll() is None and not any(finished.glob("[!.]*")):
        time.sleep(0.005)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, driver.stderr and driver.stderr.read()[-2000:]
    records = sorted(path.name for path in finished.iterdir() if not path.name.startswith("."))
    shards = [name for name in expected if name.endswith(".safetensors")]
    assert 0 < len(records) < len(shards)
    living = shutil.ignore_patterns("attempts")  # its workers have not noticed yet
    shutil.copytree(tmp_path / ".out.streaming", tmp_path / ".again.streaming", ignore=living)
    alone(plan, tmp_path / "out")
    spread(plan, tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again") == expected


def test_a_worker_with_another_version_is_refused(
    cluster: Any, tiny: Tiny, tmp_path: Path, small_shards: None
) -> None:
    other = tmp_path / "site" / "nvidia_modelopt-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-modelopt\nVersion: 0.1\n")
    added = cluster.add_node(**{**node(), "num_cpus": 2}, env_vars={"PYTHONPATH": str(other.parent)})
    plan = plan_for(tiny("qwen3_moe"), "w4a16_nvfp4")
    try:
        with pytest.raises(ToolchainError, match=r"version of nvidia-modelopt: '[^']+' -> '0\.1'") as refused:
            spread(plan, tmp_path / "out", executor=ExecutorOptions(name="ray", ray_cpus=2))
    finally:
        cluster.remove_node(added, allow_graceful=False)
    assert refused.value.code == "TC-238" and not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.streaming" / "attempts").exists()
    spread(plan, tmp_path / "out")
    alone(plan, tmp_path / "alone")
    assert files(tmp_path / "out") == files(tmp_path / "alone")


@pytest.mark.parametrize(
    ("kind", "format", "options", "elsewhere"),
    [
        ("qwen3_moe", "nvfp4", {"policy": "all-linear", "kv_cache": "fp8"}, True),
        ("qwen3_moe", "fp8", {}, True),
        ("mixtral", "nvfp4", {"recipe": "window"}, False),
    ],
)
def test_calibrated_layers_are_packed_elsewhere(
    kind: str,
    format: str,
    options: dict[str, Any],
    elsewhere: bool,
    cluster: Any,
    tiny: Tiny,
    tmp_path: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the numbers follow from the source and the ranges; else they are packed where they were chosen."""
    from toolchain.quantize.streaming.ray_pieces import RayPieces

    sent = list[str]()
    begin = RayPieces.begin

    def count(self: RayPieces, jobs: Any) -> Any:
        sent.extend(name for job in jobs for name in job.names)
        return begin(self, jobs)

    monkeypatch.setattr(RayPieces, "begin", count)
    plan = plan_for(tiny(kind), format, **options)
    quantize(plan, tmp_path / "memory", device="cpu", stream=False)
    manifest = quantize(plan, tmp_path / "spread", device="cpu", executor=ON_RAY)
    assert files(tmp_path / "spread") == files(tmp_path / "memory")
    assert any("experts.3.down_proj" in name for name in sent) == elsewhere
    assert manifest["executor"]["name"] == "ray" and manifest["executor"]["version"] == ray.__version__
    assert hidden(tmp_path) == []


def test_the_command(cluster: Any, tiny: Tiny, tmp_path: Path, toolchain: Callable[..., Any]) -> None:
    base = ("quantize", tiny("qwen3_moe"), "--format", "w4a16_nvfp4", "--json")
    ran = toolchain(*base, "--output", tmp_path / "out", "--executor", "ray", "--ray-cpus", 1)
    assert ran.status == 0, ran.err
    assert ran.json["executor"]["cpus_per_task"] == 1
    alone(plan_for(tiny("qwen3_moe"), "w4a16_nvfp4"), tmp_path / "alone")
    weights = {"model.safetensors", "model.safetensors.index.json", "config.json", "hf_quant_config.json"}
    got, expected = files(tmp_path / "out"), files(tmp_path / "alone")
    assert {name: got.get(name) for name in weights} == {name: expected.get(name) for name in weights}
    for words, said in (
        (("--executor", "ray", "--ray-cpus", 9), "the largest node has 1 CPUs"),
        (("--executor", "ray", "--device", "cuda"), "the cluster has 0 GPUs"),
        (("--executor", "ray", "--no-stream"), "--no-stream with --executor ray"),
        (("--ray-address", "a:1"), "--executor local"),
    ):
        ran = toolchain(*base, "--output", tmp_path / "refused", *words)
        assert ran.status == 2 and ran.json["error"]["code"] == "TC-236"
        assert said in ran.json["error"]["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]
