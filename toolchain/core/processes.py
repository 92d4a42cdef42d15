"""Processes that this one starts in a group of their own, and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM is Ctrl-C while inside, so that processes which were started here are ended before this one is.

    Only the main thread may set a handler; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def end_group(process: subprocess.Popen[Any], grace_s: float) -> None:
    """SIGTERM to the group that ``process`` leads, SIGKILL to those that are left after ``grace_s`` seconds, twice at
    most: for the leader, and for the rest."""
    signal_group(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    deadline = time.monotonic() + grace_s
    while signal_group(process.pid, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    signal_group(process.pid, signal.SIGKILL)
    process.wait()


def signal_group(group: int, number: int) -> bool:
    """Whether there was anybody to signal; ``number`` 0 only asks."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
