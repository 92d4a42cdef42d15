"""trtllm-build as a process: its log is kept and read for progress, and none of its processes outlives it."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from toolchain.core.errors import ToolchainError
from toolchain.core.processes import end_group, sigterm_raises
from toolchain.core.progress import Progress

GRACE_S = 5.0
"""Between SIGTERM and SIGKILL."""
TAIL_LINES = 15
TIMEOUT_S = 12 * 3600.0

STARTED = re.compile(r"Build TensorRT engine (.+)")
OPTIMIZED = re.compile(r"Total time of building (?!all)(.+): (\d+:\d\d:\d\d)")
WRITTEN = re.compile(r"Serializing engine to .*rank(\d+)\.engine")
FINISHED = re.compile(r"Total time of building all engines: (\d+:\d\d:\d\d)")
ERROR = re.compile(r"\[E\]|^\w*Error\b|^Traceback")
WARNING = re.compile(r"\[W\]")
"""Lines of ``tensorrt_llm/builder.py`` and ``tensorrt_llm/commands/build.py``; [E] and [W] are its logger's levels."""


@dataclass(kw_only=True)
class BuildLog:
    """What the log said so far."""

    ranks: list[int] = field(default_factory=list)
    """Ranks whose engine is being written or was."""
    errors: list[str] = field(default_factory=list)
    warnings: int = 0
    total: str = ""
    """hh:mm:ss of all engines, by its own clock."""
    tail: list[str] = field(default_factory=list)

    def read(self, line: str, progress: Progress) -> int | None:
        """Take in one line; the number of a rank that the line says is ready."""
        self.tail = [*self.tail[-TAIL_LINES + 1 :], line]
        self.warnings += bool(WARNING.search(line))
        if ERROR.search(line):
            self.errors.append(line)
        if STARTED.search(line):
            progress.note("trtllm-build: TensorRT chooses kernels")
        elif found := OPTIMIZED.search(line):
            progress.note(f"trtllm-build: network optimized in {found.group(2)}")
        elif found := WRITTEN.search(line):
            self.ranks.append(int(found.group(1)))
            return self.ranks[-1]
        elif found := FINISHED.search(line):
            self.total = found.group(1)
        return None


@dataclass(frozen=True, kw_only=True)
class Finished:
    seconds: float
    log: BuildLog


def run_build(
    command: Sequence[str], log_file: Path, *, ranks: int, progress: Progress, timeout_s: float = TIMEOUT_S
) -> Finished:
    """Run trtllm-build to its end. ToolchainError TC-422 when it fails or takes longer than ``timeout_s``.

    Whatever ends the run (Ctrl-C and SIGTERM too) ends all processes of the build. The log stays in ``log_file``.
    """
    started = time.monotonic()
    log = BuildLog()
    late = threading.Event()
    with log_file.open("w", encoding="utf-8") as kept, sigterm_raises():
        process = _spawn(command)
        watchdog = threading.Timer(timeout_s, _end_late, (process, late))
        watchdog.daemon = True
        watchdog.start()
        try:
            ready = _ready_ranks(process, kept, log, progress)
            for _ in progress.track(ready, description="engines", total=ranks):
                pass
            status = process.wait()
        finally:
            watchdog.cancel()
            end_group(process, GRACE_S)
    if late.is_set():
        raise _failed(f"took longer than {timeout_s:g} s and was ended", log, log_file)
    if status:
        raise _failed(f"ended with status {status}", log, log_file)
    return Finished(seconds=round(time.monotonic() - started, 2), log=log)


def _spawn(command: Sequence[str]) -> subprocess.Popen[str]:
    """In a session of its own: Ctrl-C reaches only us, and its workers can be ended with it."""
    try:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ToolchainError(f"{command[0]} cannot be started: {error}", code="TC-422") from error


def _ready_ranks(
    process: subprocess.Popen[str], kept: IO[str], log: BuildLog, progress: Progress
) -> Iterator[int]:
    if process.stdout is None:
        return
    for line in process.stdout:
        kept.write(line)
        kept.flush()
        rank = log.read(line.rstrip(), progress)
        if rank is not None:
            yield rank


def _end_late(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    end_group(process, GRACE_S)


def _failed(what: str, log: BuildLog, log_file: Path) -> ToolchainError:
    lines = log.errors[-5:] or log.tail
    said = "\n".join(lines) or "(nothing)"
    return ToolchainError(
        f"trtllm-build {what}. It said:\n{said}", hint=f"the whole log: {log_file}", code="TC-422"
    )
