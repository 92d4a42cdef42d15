"""The processes of one session, so that a server's children cannot outlive it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

GRACE_S = 3.0


def session_members(session: int) -> list[int]:
    """Process ids whose session is ``session`` (Linux: field 6 of /proc/PID/stat), zombies left out."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, _, process_session = stat.rpartition(")")[2].split()[:4]
        if int(process_session) == session and state != "Z":
            members.append(int(entry.name))
    return members


def end_session(session: int) -> None:
    """Give what is left of a session whose leader has ended a moment to end by itself, then kill it."""
    deadline = time.monotonic() + GRACE_S
    while session_members(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in session_members(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
