"""Largest resident memory of running processes, as Linux counts it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

PEAK = "VmHWM:"


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
