"""What a worker on another machine does, in this process: no attempt disturbs another, and what is off is refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests import streamed
from tests.planning import plan_for
from tests.streamed import files
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import atomic_write_json, read_json, sha256_file
from toolchain.core.progress import Silent
from toolchain.plan.types import Plan
from toolchain.quantize.job import quantize
from toolchain.quantize.streaming import worker
from toolchain.quantize.streaming.calibrated import quantize_layers
from toolchain.quantize.streaming.datafree import named_dtype, open_stream, quantize_stream, settings
from toolchain.quantize.streaming.executor import ExecutorOptions, PackJob, open_executor
from toolchain.quantize.streaming.journal import SETTINGS, Journal, open_journal
from toolchain.quantize.streaming.local_executor import LocalExecutor
from toolchain.quantize.streaming.pack import Packer
from toolchain.quantize.streaming.ray_tasks import attempts_of

Tiny = Callable[[str], Path]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed.small_shards(monkeypatch)


@contextmanager
def begun(plan: Plan, output: Path) -> Iterator[tuple[worker.Work, Journal]]:
    """What a driver hands out for a run that has just begun."""
    source = open_stream(plan, dtype=named_dtype(Path(plan.model)))
    journal = open_journal(output, settings(source), force=False, progress=Silent())
    with journal as opened, attempts_of(opened) as attempts:
        yield worker.make_work(source, opened, attempts, device="cpu", threads=1), opened


def test_two_workers_that_write_the_same_shard(
    tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One was given up for dead, and goes on writing beside the one that took its place."""
    plan = plan_for(tiny("qwen3_moe"), "w4a16_nvfp4")
    quantize_stream(plan, tmp_path / "whole", device="cpu")
    file = "model-00002-of-00010.safetensors"
    put = Packer.write
    made = list[worker.Made]()
    with begun(plan, tmp_path / "out") as (work, _):

        def late(self: Packer, item: Any, shard: Any, **options: Any) -> None:
            put(self, item, shard, **options)
            if not made:  # in the middle of the first one's shard
                monkeypatch.setattr(Packer, "write", put)
                made.append(worker.write(work, file))

        monkeypatch.setattr(Packer, "write", late)
        with pytest.raises(FileNotFoundError):  # what it wrote is nowhere
            worker.write(work, file)
        left = sorted(path.name for path in Path(work.attempts).iterdir())
        assert left == [made[0].attempt]
        assert sha256_file(Path(work.attempts) / left[0]) == made[0].sha256
        assert made[0].sha256 == sha256_file(tmp_path / "whole" / file)


def test_a_worker_that_sees_other_files_refuses(tiny: Tiny, tmp_path: Path, small_shards: None) -> None:
    source = shutil.copytree(tiny("qwen3_moe"), tmp_path / "source")
    plan, file = plan_for(source, "w4a16_nvfp4"), "model-00001-of-00010.safetensors"

    def refused(work: worker.Work) -> str:
        worker._open.cache_clear()  # as in another process
        with pytest.raises(ToolchainError) as error:
            worker.write(work, file)
        assert error.value.code == "TC-238"
        return error.value.message

    with begun(plan, tmp_path / "out") as (work, journal):
        begin = read_json(journal.root / SETTINGS)
        atomic_write_json(journal.root / SETTINGS, {**begin, "recipe": "other"})
        assert "is not what the run was begun with" in refused(work)
        atomic_write_json(journal.root / SETTINGS, begin)
        tensors = load_file(source / "model.safetensors")
        save_file(tensors, source / "model.safetensors", {"format": "pt", "more": "x"})
        assert "source files: " in refused(work)
        source.rename(tmp_path / "moved")
        assert f"the model ({source}) is not there" in refused(work)
        (tmp_path / "moved").rename(source)
        shutil.rmtree(work.attempts)
        assert "the output" in refused(work)


class Here:
    """``Pieces`` without another process."""

    def __init__(self, work: worker.Work) -> None:
        self.work, self.names = work, list[str]()

    def begin(self, jobs: Sequence[PackJob]) -> Iterator[tuple[PackJob, Path]]:
        for job in reversed(jobs):
            self.names.extend(job.names)
            yield job, Path(self.work.attempts) / worker.pack(self.work, job)


@pytest.mark.parametrize(
    ("kind", "format", "options", "least"),
    [
        ("qwen3_moe", "nvfp4", {"policy": "all-linear", "kv_cache": "fp8"}, 24 + 4),
        ("deepseek_v3", "nvfp4", {}, 12),
        ("glm4_moe", "fp8", {}, 12),
        ("minimax", "w4a8_nvfp4_fp8", {}, 24),
        ("qwen3_moe", "fp8_block", {"kv_cache": "fp8"}, 24),
        ("mixtral", "nvfp4", {"recipe": "best"}, 0),
        ("mixtral", "int4_awq", {}, 0),
        ("gpt_oss", "nvfp4", {}, 0),
    ],
)
def test_a_layer_packed_elsewhere_is_the_layer_in_memory(
    kind: str,
    format: str,
    options: dict[str, Any],
    least: int,
    tiny: Tiny,
    tmp_path: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``least``: matrices whose numbers follow from the source and the ranges; 0: a recipe chose them in memory."""
    plan = plan_for(tiny(kind), format, **options)
    quantize(plan, tmp_path / "memory", device="cpu", stream=False)
    used = list[Here]()

    @contextmanager
    def here(self: LocalExecutor, source: Any, journal: Journal) -> Iterator[Here]:
        with attempts_of(journal) as attempts:
            used.append(Here(worker.make_work(source, journal, attempts, device="cpu", threads=2)))
            yield used[-1]

    monkeypatch.setattr(LocalExecutor, "pieces", here)
    quantize_layers(plan, tmp_path / "pieces", device="cpu")
    assert files(tmp_path / "pieces") == files(tmp_path / "memory")
    assert len(used[0].names) >= least and bool(used[0].names) == bool(least)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UsageError, match="needs the package ray") as error,
        open_executor(ExecutorOptions(name="ray")),
    ):
        pass
    assert error.value.code == "TC-236" and "toolchain[ray]" in error.value.hint


@pytest.mark.parametrize(
    ("address", "code"),
    [("127.0.0.2:1", "TC-237"), ("ray://127.0.0.2:10001", "TC-236"), ("nowhere", "TC-236")],
)
def test_where_no_cluster_is(address: str, code: str) -> None:
    pytest.importorskip("ray")
    asked = ExecutorOptions(name="ray", ray_address=address)
    with pytest.raises(ToolchainError, match=address) as error, open_executor(asked):
        pass
    assert error.value.code == code
