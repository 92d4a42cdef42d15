"""Who runs the cells: a process each, one after the other, on this machine or on those of a Ray cluster."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from toolchain.core.progress import Progress

LAST_LINES = 5
"""Of what a process said before it ended without a record."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The process of one cell. It writes the cell's record."""

    name: str
    command: tuple[str, ...]
    """Ends, whatever it is at, when its stdin is closed: so nothing outlives a parent that is killed."""
    log: Path
    """Gets all that it says."""
    directory: Path
    """Where paths begin that are not absolute."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    name: str
    status: int
    """Exit status; below 0: the signal that ended it."""
    last_words: str
    seconds: float = 0.0


class CellExecutor(Protocol):
    def run(self, jobs: Sequence[Job], progress: Progress) -> Generator[Ended, None, None]:
        """Each as it ends, in any order. Closing the iterator ends those that run."""


class LocalCells:
    """One after the other: a cell takes all of the machine's memory and GPUs, and gives them back."""

    def run(self, jobs: Sequence[Job], progress: Progress) -> Generator[Ended, None, None]:
        for number, job in enumerate(jobs, start=1):
            progress.note(f"cell {number} of {len(jobs)}: {job.name}")
            yield run_job(job, progress)


def run_job(job: Job, progress: Progress) -> Ended:
    """Run the process to its end; what it says goes to ``progress`` and into the log."""
    started, path = time.monotonic(), job.directory / job.log
    path.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=LAST_LINES)
    process = subprocess.Popen(
        job.command,
        cwd=job.directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        with path.open("w", encoding="utf-8") as log:
            for line in process.stderr or ():
                log.write(line)
                log.flush()
                last.append(line.rstrip())
                progress.note(f"  {line.rstrip()}")
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        for stream in (process.stdin, process.stderr):
            if stream is not None:
                stream.close()
    return Ended(
        name=job.name,
        status=status,
        last_words="; ".join(filter(None, last)),
        seconds=time.monotonic() - started,
    )


def end_with(handle: int) -> None:
    """Called in the process of a job: end it at once when ``handle``, its stdin, is closed by whoever started it."""

    def watch() -> None:
        while os.read(handle, 1):  # unbuffered: a buffer's lock would be held when the interpreter ends
            pass
        os._exit(143)  # as after SIGTERM: files are complete or absent, whatever is cut off here

    threading.Thread(target=watch, daemon=True).start()
