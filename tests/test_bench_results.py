"""Results in files, and GPUs watched through a stand-in of NVIDIA's library."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolchain.bench.gpu import GIB, GpuSampler, gpus_of
from toolchain.bench.intervals import intervals
from toolchain.bench.records import Measured, Record
from toolchain.bench.results import read_result, write_result
from toolchain.bench.statistics import summary
from toolchain.bench.types import BenchResult, Generator, GpuUse, Level, Repeat, Settings
from toolchain.core.errors import UsageError

ONE = {"p50": 30.5, "p90": 52.9, "p99": 54.4, "mean": 34.0, "count": 4}
VERSION_1 = {
    "schema_version": 1,
    "created": "2026-11-21T10:41:38+00:00",
    "url": "127.0.0.1:38501",
    "model": "tensorrt_llm",
    "settings": {
        "concurrency": [1, 4], "requests": 4, "prompt_tokens": 64, "output_tokens": 32, "seed": 0, "timeout_s": 300.0,
        "ignore_eos": True,
    },
    "environment": {"cpu": "AMD EPYC", "cpu_cores": 2, "gpus": [], "server": {"name": "triton", "version": "2.51.0"}},
    "levels": [
        {
            "concurrency": users, "requests": 4, "errors": 1, "error_messages": {"down": 1}, "warmup_errors": 0,
            "duration_s": 1.5, "ttft_ms": ONE, "itl_ms": ONE, "tpot_ms": None, "e2e_ms": ONE, "prompt_tokens": 256,
            "output_tokens": 128, "output_tokens_per_s": 85.3, "requests_per_s": 2.6,
        }
        for users in (1, 4)
    ],
    "token_counting": "engine tokenizer on the returned text, at most output_tokens each",
    "load": "closed loop, gRPC streaming",
}  # fmt: skip
"""What the first version wrote."""


def written(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "result.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_results_of_the_first_version_are_read(tmp_path: Path) -> None:
    found = read_result(written(tmp_path, VERSION_1))
    assert (found.schema_version, found.target, found.tool) == (2, "triton-grpc", "toolchain")
    assert found.settings.concurrency == (1, 4) and found.settings.repeats == 1
    first = found.levels[0]
    assert first.ttft_ms is not None and (first.ttft_ms.p50, first.ttft_ms.p95) == (30.5, None)
    assert (first.tpot_ms, first.repeats, first.intervals, first.generator) == (None, (), {}, None)
    assert (first.errors, first.error_messages, first.output_tokens_per_s) == (1, {"down": 1}, 85.3)


def result() -> BenchResult:
    """One with everything in it."""
    settings = Settings(
        concurrency=(2,), requests=2, repeats=2, ttft_slo_ms=500.0, prompt_tokens="uniform:4,9"
    )
    record = Record(started_s=1.0, finished_s=1.9, piece_s=(1.2, 1.5, 1.9), prompt_tokens=4, output_tokens=3)
    repeats = [Measured(records=[record], start_s=1.0, end_s=end) for end in (2.0, 2.5)]
    gpu = GpuUse(devices=("H200",), memory_peak_gib=3.5, power_mean_w=300.0, energy_per_token_j=None)
    generator = Generator(
        ceiling_tokens_per_s=9000.0, ceiling_by="generator", added_ttft_ms=1.0, jitter_p99_ms=0.3, cpu_share=0.2,
        lag_p99_ms=0.4, send_lag_p99_ms=None, limited=True, why=("slow",),
    )  # fmt: skip
    each = tuple(
        Repeat(**summary([item], settings=settings, gpus=4), started="2026-11-21T10:41:38+00:00", gpu=gpu)
        for item in repeats
    )
    level = Level(
        **summary(repeats, settings=settings, gpus=4), concurrency=2, repeats=each, intervals=intervals(each),
        generator=generator, gpu=gpu,
    )  # fmt: skip
    return BenchResult(
        created="2026-11-21T10:41:38+00:00", url="u", model="m", settings=settings, environment={"gpus": ["H200"]},
        levels=(level,), target="openai", gpus=4, partial=True,
    )  # fmt: skip


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_result(tmp_path / "bench" / "r.json", result())
    assert read_result(tmp_path / "bench" / "r.json") == result()
    opened = replace(result(), settings=Settings(concurrency=(), rate=(0.5, 2.0)))
    write_result(tmp_path / "open.json", opened)
    assert read_result(tmp_path / "open.json") == opened


def test_keys_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    value = json.loads(json.dumps(result().to_json()))
    value["levels"][0]["weather"] = value["weather"] = value["settings"]["weather"] = "fine"
    assert read_result(written(tmp_path, value)) == result()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[]", "no result of toolchain bench"),
        ({"schema_version": 2}, "no result of toolchain bench"),
        ({**VERSION_1, "schema_version": 3}, "schema version 3, expected 1 or 2"),
        ({**VERSION_1, "levels": [{"concurrency": 1}]}, "no complete result"),
        ({**VERSION_1, "settings": {"concurrency": [0]}}, "no complete result"),
        ({**VERSION_1, "levels": 5}, "no complete result"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_result(written(tmp_path, value))
    assert caught.value.code == "TC-706" and words in caught.value.message


class Nvml:
    """pynvml with two devices: 1 GiB and 100 W, 2 GiB and 200 W; memory grows by a GiB with each look."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, power: bool = True, devices: int = 2, driver: bool = True) -> None:
        self._power, self._devices, self._driver = power, devices, driver
        self.looks = [0] * devices
        self.enough = threading.Event()
        self.shut = False

    def nvmlInit(self) -> None:
        if not self._driver:
            raise self.NVMLError("driver not loaded")

    def nvmlShutdown(self) -> None:
        self.shut = True

    def nvmlDeviceGetCount(self) -> int:
        return self._devices

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= self._devices:
            raise self.NVMLError("invalid argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return int(uuid[-1])

    def nvmlDeviceGetName(self, handle: int) -> Any:
        return b"NVIDIA H200" if handle else "NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        self.looks[handle] += 1
        if self.looks[handle] >= 3:
            self.enough.set()
        return SimpleNamespace(used=(handle + self.looks[handle]) * GIB)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if not self._power:
            raise self.NVMLError("not supported")
        return (handle + 1) * 100_000


def watched(monkeypatch: pytest.MonkeyPatch, nvml: Nvml) -> tuple[GpuSampler, list[tuple[float, float]]]:
    """Three looks at least, and the windows that hold them all."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    start = time.perf_counter()
    with GpuSampler() as sampler:
        assert nvml.enough.wait(10)
    return sampler, [(start, time.perf_counter())]


def test_memory_and_power_are_those_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    sampler, windows = watched(monkeypatch, nvml := Nvml())
    found = sampler.use(windows, tokens=100)
    assert found is not None and found.devices == ("NVIDIA H100", "NVIDIA H200")
    assert found.memory_peak_gib == nvml.looks[0] + nvml.looks[1] + 1 and found.power_mean_w == 300.0
    seconds = windows[0][1] - windows[0][0]
    assert found.energy_per_token_j == pytest.approx(300.0 * seconds / 100)
    assert sampler.use([(0.0, 1.0)], tokens=1) is None, "nothing was seen then"
    assert nvml.shut


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ("NVIDIA H200",)),
        ("GPU-1", ("NVIDIA H200",)),
        ("1,-1,0", ("NVIDIA H200",)),
        ("0", ("NVIDIA H100",)),
    ],
)
def test_only_visible_devices_are_watched(
    monkeypatch: pytest.MonkeyPatch, visible: str, names: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    sampler, windows = watched(monkeypatch, Nvml(power=False))
    found = sampler.use(windows, tokens=1)
    assert found is not None and found.devices == names
    assert (found.power_mean_w, found.energy_per_token_j) == (None, None)


@pytest.mark.parametrize(
    ("nvml", "visible"), [(Nvml(driver=False), None), (Nvml(devices=0), None), (Nvml(), "7")]
)
def test_no_gpu_is_no_error(monkeypatch: pytest.MonkeyPatch, nvml: Nvml, visible: str | None) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with GpuSampler() as sampler:
        assert sampler.count == 0
    assert sampler.use([(0.0, 1e12)], tokens=1) is None


def test_gpus_of_an_engine(tmp_path: Path) -> None:
    def engine(**manifest: Any) -> Path:
        (tmp_path / "engine.json").write_text(json.dumps(manifest))
        return tmp_path

    assert gpus_of(None, seen=0) is None and gpus_of(None, seen=2) == 2
    parallel = {"tp": 4, "pp": 2, "ep": 4}
    assert gpus_of(engine(target="trtllm", parallel=parallel), seen=0) == 8
    assert gpus_of(engine(target="local", parallel=parallel), seen=0) is None
    assert gpus_of(engine(target="local", parallel=parallel), seen=8) == 1
