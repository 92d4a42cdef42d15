"""The Python stubs of a tritonserver, one process for each instance of each version of each model.

Triton never restarts one, and never says that it died; its disappearance from the process table is the fastest sign.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from toolchain.triton.sessions import session_members

STUB = "triton_python_backend_stub"


@dataclass(frozen=True, kw_only=True)
class Stub:
    pid: int
    model: str
    version: int
    instance: str
    """Such as ``tensorrt_llm_0_0``."""


def find_stubs(session: int) -> list[Stub]:
    """The stubs that run in the session of a tritonserver (its process id).

    tritonserver 2.51 starts them as ``triton_python_backend_stub MODEL/VERSION/model.py REGION ... INSTANCE DEFAULT``.
    """
    found = []
    for pid in session_members(session):
        words = _command(pid)
        if len(words) < 3 or Path(words[0]).name != STUB:
            continue
        version = Path(words[1]).parent
        instance = next((word for word in words[2:] if word.startswith(f"{version.parent.name}_")), "")
        if version.name.isdigit():
            found.append(
                Stub(pid=pid, model=version.parent.name, version=int(version.name), instance=instance)
            )
    return found


def descendants(pid: int) -> list[int]:
    """Process ids of the children of ``pid`` and theirs: of a stub of target local, its engine process."""
    parents = {
        int(entry.name): _parent(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()
    }
    found, generation = [], [pid]
    while generation:
        generation = [child for child, parent in parents.items() if parent in generation]
        found += generation
    return found


def kill_tree(pid: int) -> None:
    """SIGKILL ``pid`` and what it started: a stub that hangs would keep its engine, and its memory, for ever."""
    for each in (*descendants(pid), pid):
        kill(each)


def kill(pid: int) -> None:
    """SIGKILL ``pid`` if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _parent(name: str) -> int:
    try:
        return int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
