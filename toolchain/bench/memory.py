"""Largest resident memory of running processes, as Linux counts it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolchain.core.environment import peak_memory_bytes
from toolchain.triton.server import TritonServer
from toolchain.triton.sessions import session_members

PEAK = "VmHWM:"


def memory_of(server: object) -> dict[str, Any] | None:
    """Peak of what was measured, while it still runs: of a server that was started here, or of this process, which ran
    the engine in a directory (a Path). None for a server that is only known by its address."""
    if isinstance(server, TritonServer) and server.process is not None:
        peak = peak_memory_of(session_members(server.process.pid))
        return None if peak is None else {"process_peak_bytes": peak, "of": "the server and its workers"}
    if isinstance(server, Path):
        return {
            "process_peak_bytes": peak_memory_bytes(),
            "of": "one process: engine, libraries, load generator",
        }
    return None


def peak_memory_of(processes: Iterable[int]) -> int | None:
    """Sum of the peaks of ``processes`` (ids) in bytes; those that have ended count nothing. None where nobody tells.

    The peaks need not have been at the same moment, and pages that processes share are counted for each: it is an upper
    bound, close where one process holds the model.
    """
    found = [peak for process in processes if (peak := _peak(process)) is not None]
    return sum(found) if found else None


def _peak(process: int) -> int | None:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    kibibytes = next((line.split()[1] for line in lines if line.startswith(PEAK)), None)
    return None if kibibytes is None else int(kibibytes) * 1024
