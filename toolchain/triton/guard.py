"""A process that ends a server whose parent was killed: kill -9, or the out-of-memory killer, leave us no moment to.

The server would otherwise go on: it holds its ports, its model and its memory, and nobody supervises it.
"""

from __future__ import annotations

import contextlib
import subprocess

SCRIPT = """
read -r word && exit 0
kill -TERM "$1"
waited=0
while kill -0 "$1" && [ "$waited" -lt "$3" ]; do
    sleep 1
    waited=$((waited + 1))
done
kill -KILL -- "-$1"
rm -f "$2"*
"""
"""Arguments: process (and group) id, path prefix of its shared memory, seconds that running requests may take. A word
on stdin sends it home; the end of stdin, with no word, means that whoever held the other end has died."""


class Guard:
    """Watches over one server process for as long as this process lives."""

    def __init__(self, pid: int, *, shm_prefix: str, grace_s: float) -> None:
        """``pid``: leads its process group. ``shm_prefix``: absolute path that its shared memory begins with."""
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", SCRIPT, "guard", str(pid), shm_prefix, str(round(grace_s))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """The server has ended, nothing is left of it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"ended\n")
            self._process.stdin.close()
        self._process.wait()
