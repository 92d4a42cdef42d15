"""Run one process and say what it took, by the operating system's own accounting."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECTOR = 512
"""Bytes that ``ru_inblock`` and ``ru_oublock`` count in."""
POLL_S = 0.1
CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Watched:
    """What /proc tells while the process lives."""

    anonymous_peak_bytes: int = 0
    """Largest RssAnon that was seen: without the pages of mapped files."""


def run_measured(command: tuple[str, ...], *, cwd: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Seconds, CPU seconds, peak resident memory, bytes from and to the disk; ``error`` when it failed.

    ``wait4`` counts the process and those that it waited for. This process must be small: Linux counts the memory of
    the one that forks until the new program starts.
    """
    group = _cgroup()
    watched, ended = Watched(), threading.Event()
    log = cwd / "output.log"
    with log.open("wb") as handle:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT, cwd=cwd, env=environment)
        if group is not None:
            (group / "cgroup.procs").write_text(str(process.pid), encoding="ascii")
        watcher = threading.Thread(target=_watch, args=(process.pid, watched, ended))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    made: dict[str, Any] = {
        "seconds": round(seconds, 2),
        "cpu_user_s": round(usage.ru_utime, 2),
        "cpu_system_s": round(usage.ru_stime, 2),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "anonymous_peak_bytes": watched.anonymous_peak_bytes,
        "disk_read_bytes": usage.ru_inblock * SECTOR,
        "disk_written_bytes": usage.ru_oublock * SECTOR,
        "steps": _last_json(log),
    }
    if group is not None:
        made["cgroup_peak_bytes"] = int((group / "memory.peak").read_text(encoding="ascii"))
        group.rmdir()
    if process.returncode:
        made["error"] = log.read_text(encoding="utf-8", errors="replace")[-1500:]
    return made


def _watch(pid: int, watched: Watched, ended: threading.Event) -> None:
    while not ended.wait(POLL_S):
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return
        found = dict(line.split(":", 1) for line in lines)
        if "RssAnon" in found:
            own = int(found["RssAnon"].split()[0]) * 1024
            watched.anonymous_peak_bytes = max(watched.anonymous_peak_bytes, own)


def _cgroup() -> Path | None:
    """A new cgroup (v2) with memory accounting, where this process may make one; it counts the page cache as well."""
    group = CGROUP / f"streaming-benchmark-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
    except OSError:
        return None
    if (group / "memory.peak").is_file():
        return group
    group.rmdir()
    return None


def _last_json(log: Path) -> Any:
    """What the script printed as its last line, when that is JSON."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None


def drop_from_cache(directory: Path) -> None:
    """The files of ``directory`` are read from the disk next time, by whoever reads them."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
