"""What this process runs on: package versions, memory, git commit. For manifests."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "toolchain", "torch", "transformers", "nvidia-modelopt", "safetensors", "tokenizers", "tensorrt-llm",
    "tritonclient", "numpy",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what an engine is; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int:
    """Resident set of this process now; its peak where the system does not tell."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return peak_memory_bytes()
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def git_commit() -> str | None:
    """Commit of the toolchain's own checkout, with ``+changes`` when it is dirty; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if dirty else head
