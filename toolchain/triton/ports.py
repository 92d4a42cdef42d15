"""TCP ports: refuse those in use before a server starts, choose free ones where 0 was asked for."""

from __future__ import annotations

import contextlib
import socket

from toolchain.core.errors import UsageError


def check_free(address: str, *ports: int) -> None:
    """UsageError that names every one of ``ports`` (0 left out) on which something listens, or which comes
    twice."""
    wanted = [port for port in ports if port]
    taken = sorted({port for port in wanted if wanted.count(port) > 1 or not _can_bind(address, port)})
    if taken:
        raise UsageError(
            f"port {', '.join(str(port) for port in taken)} on {address} is in use or asked for twice",
            hint="choose other ports, or 0 for any free one",
            code="TC-624",
        )


def choose_free(address: str, *ports: int) -> tuple[int, ...]:
    """``ports`` with each 0 replaced by a free port; all of them differ."""
    chosen = []
    with contextlib.ExitStack() as held:
        for port in ports:
            if not port:
                probe = held.enter_context(socket.socket())
                probe.bind((address, 0))
                port = probe.getsockname()[1]
            chosen.append(port)
    return tuple(chosen)


def _can_bind(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
