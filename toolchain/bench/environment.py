"""Where a benchmark was measured: without it a figure means nothing a month later."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from toolchain.bench.identity import describe_engine

PACKAGES = (
    "toolchain",
    "torch",
    "transformers",
    "nvidia-modelopt",
    "tritonclient",
    "grpcio",
    "aiohttp",
    "numpy",
    "tokenizers",
)


def describe_environment(
    *, engine_dir: Path | None, server: dict[str, Any] | None, memory: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Versions, CPU, GPUs, the server's own words about itself, the engine or checkpoint (``describe_engine``), and how
    much memory it took (``memory_of``)."""
    return {
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "gpus": _gpus(),
        "server": server,
        "engine": describe_engine(engine_dir),
        "memory": memory,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Name, memory and driver of each GPU as nvidia-smi says it; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return result.stdout.strip().splitlines() if result.returncode == 0 else []
