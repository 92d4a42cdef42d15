"""Memory and power of the GPUs while a load runs: NVIDIA's management library, ten times a second."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from toolchain.bench.types import GpuUse
from toolchain.core.files import read_json

PERIOD_S = 0.1
GIB = 1024**3


class GpuSampler:
    """A context manager that samples in a thread of its own; without a GPU, or without NVML, it does nothing."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._names: list[str] = []
        self._nvml: Any = None
        self._samples: list[tuple[float, float, float | None]] = []
        """(time.perf_counter(), bytes, watts), summed over the devices; power None where one does not tell."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def count(self) -> int:
        """Devices that it sees."""
        return len(self._handles)

    def __enter__(self) -> Self:
        self._open()
        if self._handles:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def use(self, windows: list[tuple[float, float]], *, tokens: float) -> GpuUse | None:
        """Of the ``windows`` (start and end, time.perf_counter()) in which ``tokens`` were generated; None of no
        sample."""
        found = [item for item in self._samples if any(start <= item[0] <= end for start, end in windows)]
        if not found:
            return None
        watts = [power for _, _, power in found if power is not None]
        mean = sum(watts) / len(watts) if len(watts) == len(found) else None
        seconds = sum(end - start for start, end in windows)
        return GpuUse(
            devices=tuple(self._names),
            memory_peak_gib=max(used for _, used, _ in found) / GIB,
            power_mean_w=mean,
            energy_per_token_j=mean * seconds / tokens if mean is not None and tokens else None,
        )

    def _open(self) -> None:
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handles = _visible(pynvml)
            self._names = [_text(pynvml.nvmlDeviceGetName(handle)) for handle in self._handles]
        except pynvml.NVMLError:
            self._handles, self._names = [], []  # no driver, or a device that cannot be asked

    def _sample(self) -> None:
        while not self._stop.is_set():
            at_s = time.perf_counter()
            try:
                used = sum(self._nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in self._handles)
            except self._nvml.NVMLError:
                return  # the device has gone; what was seen so far counts
            self._samples.append((at_s, float(used), self._watts()))
            self._stop.wait(max(0.0, PERIOD_S - (time.perf_counter() - at_s)))

    def _watts(self) -> float | None:
        try:
            return sum(self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000.0 for handle in self._handles)
        except self._nvml.NVMLError:
            return None


def _visible(nvml: Any) -> list[Any]:
    """Handles of the devices in CUDA_VISIBLE_DEVICES (indexes or UUIDs), of all without it."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    found = []
    for name in (part.strip() for part in wanted.split(",")):
        if name.isdigit():
            found.append(nvml.nvmlDeviceGetHandleByIndex(int(name)))
        elif name.startswith(("GPU-", "MIG-")):
            found.append(nvml.nvmlDeviceGetHandleByUUID(name))
        else:
            break  # as CUDA does: the first one that is no device ends the list
    return found


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


def gpus_of(engine_dir: Path | None, *, seen: int) -> int | None:
    """GPUs that an engine runs on: tp x pp of its manifest, one for target local where there is one.

    ``seen``: GPUs of the machine that serves it, 0 if not known. None: no GPU, or nobody knows.
    """
    path = engine_dir / "engine.json" if engine_dir is not None else None
    manifest = read_json(path) if path is not None and path.is_file() else None
    if not isinstance(manifest, dict):
        return seen or None
    if manifest.get("target") == "local":
        return 1 if seen else None
    parallel = manifest.get("parallel") or {}
    return int(parallel.get("tp", 1)) * int(parallel.get("pp", 1))
