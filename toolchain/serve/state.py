"""Which servers ``toolchain serve`` runs on this machine: one file each, in a directory that only this user can write.

A file says what does not change while the server runs; what does is asked of its status endpoint.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json, read_json

VARIABLE = "TOOLCHAIN_RUNTIME_DIR"


@dataclass(frozen=True, kw_only=True)
class ServerState:
    pid: int
    """Of ``toolchain serve``."""
    started_ticks: int
    """Field 22 of /proc/PID/stat: with it, another process that got the same id later is not taken for this one."""
    started: str
    """UTC, ISO 8601."""
    repository: str
    log: str
    http: str
    grpc: str
    """host:port."""
    metrics: str
    status: str
    """URL of the status endpoint."""
    openai: str
    """URL, empty without the endpoint."""


def runtime_dir() -> Path:
    """$TOOLCHAIN_RUNTIME_DIR, $XDG_RUNTIME_DIR/toolchain, or a directory of this user in the temporary directory.

    Made when it is missing. ToolchainError TC-634 when another user could write it.
    """
    named = os.environ.get(VARIABLE)
    session = os.environ.get("XDG_RUNTIME_DIR")
    if named:
        path = Path(named)
    elif session and Path(session).is_dir():
        path = Path(session) / "toolchain"
    else:
        path = Path(tempfile.gettempdir()) / f"toolchain-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = path.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise ToolchainError(
            f"{path} belongs to user {about.st_uid} with mode {stat.S_IMODE(about.st_mode):o}; "
            "expected a directory that only this user can write",
            hint=f"remove it, or name another with {VARIABLE}",
            code="TC-634",
        )
    return path


@contextlib.contextmanager
def announced(**facts: str) -> Iterator[ServerState]:
    """While inside, this process is listed with ``facts`` (the fields of ServerState beside pid and started_ticks)."""
    pid = os.getpid()
    state = ServerState(pid=pid, started_ticks=started_ticks(pid) or 0, **facts)
    path = runtime_dir() / f"{pid}.json"
    atomic_write_json(path, asdict(state))
    try:
        yield state
    finally:
        path.unlink(missing_ok=True)


def running_servers() -> list[ServerState]:
    """The servers that run, oldest first. Files of servers that were killed are removed."""
    found = []
    for path in sorted(runtime_dir().glob("[0-9]*.json")):
        state = _read(path)
        if state is not None and started_ticks(state.pid) == state.started_ticks:
            found.append(state)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda state: state.started_ticks)


def server_of(repository: Path) -> ServerState | None:
    """The server that serves ``repository``, if ``toolchain serve`` runs one."""
    wanted = str(repository.resolve())
    return next(
        (state for state in running_servers() if str(Path(state.repository).resolve()) == wanted), None
    )


def started_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when there is none, or only its zombie."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if words[0] in "ZX" else int(words[19])


def _read(path: Path) -> ServerState | None:
    """None for a file of another version of this program: it cannot be used, and says nothing wrong."""
    try:
        value: Any = read_json(path)
    except (ToolchainError, FileNotFoundError):
        return None
    names = {item.name for item in fields(ServerState)}
    return ServerState(**value) if isinstance(value, dict) and set(value) == names else None
