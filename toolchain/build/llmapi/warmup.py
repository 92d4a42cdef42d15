"""Warm-up of an engine of target ``trtllm``: its own ``warmup.py`` as a process, with the TensorRT-LLM installed here.

The script stands in the engine, so that a container that has TensorRT-LLM and no toolchain runs the same one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from toolchain.build.llmapi.files import SCRIPT
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json
from toolchain.core.progress import Progress, Silent

RESULT, LOG = "warmup.json", "warmup.log"
MISMATCH = 3
"""Exit status of the script for another release."""
LAST_LINES = 8


def is_installed() -> bool:
    """Whether this Python has tensorrt_llm. Nothing is imported: that would open the GPUs."""
    found = importlib.util.find_spec("tensorrt_llm")
    # A Triton repository has a directory of this name, which Python takes for a package without code.
    return found is not None and found.origin is not None


def require_release(planned: str) -> None:
    """UsageError TC-410 when another release is installed here; what has no metadata is asked when it runs."""
    try:
        installed = importlib.metadata.version("tensorrt-llm")
    except importlib.metadata.PackageNotFoundError:
        return
    if is_installed() and installed != planned:
        raise _mismatch(f"TensorRT-LLM {installed} is installed, the engine is planned for {planned}")


def warm_up(
    directory: Path, *, timeout_s: float | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Load the engine in ``directory``, tune it, generate a few tokens; warmup.json as it was written.

    Where TensorRT-LLM is not installed nothing runs: ``{"ran": False, "command": ...}`` has the container command.
    UsageError TC-412 for an engine of another target, TC-410 for another release; ToolchainError TC-411 when it fails
    or is killed.
    """
    progress = progress or Silent()
    if not (directory / SCRIPT).is_file():
        raise UsageError(
            f"{directory} has no {SCRIPT}",
            hint="build it with --target trtllm and this toolchain",
            code="TC-412",
        )
    if not is_installed():
        return {"ran": False, "command": container_command(directory)}
    require_release(str(read_json(directory / "versions.lock.json")["tensorrt_llm"]))
    # A result of an earlier run must not be taken for this one's.
    (directory / RESULT).unlink(missing_ok=True)
    status, said = _run(directory, timeout_s, progress)
    if status == MISMATCH:
        raise _mismatch(said)
    if status != 0 or not (directory / RESULT).is_file():
        raise _failed(directory, status, said)
    return {"ran": True, **read_json(directory / RESULT)}


def container_command(directory: Path) -> str:
    """The command of commands.json that warms this engine up in NVIDIA's container."""
    found = read_json(directory / "commands.json")["commands"]
    return str(next(item["container"] for item in found if item["name"] == "warmup"))


def _run(directory: Path, timeout_s: float | None, progress: Progress) -> tuple[int, str]:
    """(exit status, the last line that the script said). Its group is ended with it: LLM() starts one process per
    rank."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    heard = [""]

    def listen() -> None:
        for line in process.stderr or ():
            heard[0] = line.strip() or heard[0]
            progress.note(f"warm-up: {line.strip()}")

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        status = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        status, heard[0] = -signal.SIGKILL, f"no end after {timeout_s:g} s"
    finally:
        _end(process)
    listener.join(timeout=10)
    return status, heard[0]


def _end(process: subprocess.Popen[str]) -> None:
    """Ranks that outlive the script would keep the GPUs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _mismatch(said: str) -> UsageError:
    return UsageError(
        said,
        hint="build the engine with --trtllm-version for what is installed, or use the image of versions.lock.json",
        code="TC-410",
    )


def _failed(directory: Path, status: int, said: str) -> ToolchainError:
    log = directory / LOG
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    last = " | ".join(line.strip() for line in text.splitlines()[-LAST_LINES:] if line.strip())
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return ToolchainError(
        f"the warm-up {how}: {said or last or 'it said nothing'}",
        hint=f"{log} has all of it" + (f"; its end: {last}" if last and said else ""),
        code="TC-411",
    )
