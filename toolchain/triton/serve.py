"""``toolchain serve``: one engine on a tritonserver in the foreground, until it is told to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.findings import errors
from toolchain.core.progress import Progress
from toolchain.triton.engine_dir import read_engine_dir
from toolchain.triton.freshness import refuse_stale_repository
from toolchain.triton.inflight_launch import refuse_here
from toolchain.triton.lint import lint_repository
from toolchain.triton.server import LOOPBACK, TritonServer

CHECK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Ports:
    """0 chooses a free one."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


def serve_engine(
    engine_dir: Path,
    repository: Path,
    ports: Ports,
    on_ready: Callable[[TritonServer], None],
    *,
    address: str = LOOPBACK,
    log_file: Path | None = None,
    ready_timeout_s: float = 1800.0,
    exit_timeout_s: int = 10,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or ``stop``; ``on_ready`` is called once the model has answered an
    inference.

    Raises UsageError when ``repository`` was not rendered, FindingsError when its lint fails, ToolchainError
    when the server ends by itself.
    """
    engine = read_engine_dir(engine_dir)
    if not repository.is_dir():
        raise UsageError(
            f"no model repository {repository} for engine {engine.name}",
            hint="`toolchain triton` renders it",
            code="TC-604",
        )
    problems = errors(lint_repository(repository))
    if problems:
        raise FindingsError(f"{repository} cannot be served", problems, hint="render it again", code="TC-602")
    refuse_stale_repository(engine, repository)
    if engine.target == "tensorrt":
        refuse_here(engine, repository)
    stop = stop or threading.Event()
    server = TritonServer(
        repository,
        http_port=ports.http,
        grpc_port=ports.grpc,
        metrics_port=ports.metrics,
        address=address,
        log_file=log_file,
        ready_timeout_s=ready_timeout_s,
        exit_timeout_s=exit_timeout_s,
        progress=progress,
    )
    with _signals_set(stop), server:
        on_ready(server)
        while not stop.wait(CHECK_S):
            server.check_running()


@contextlib.contextmanager
def _signals_set(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set ``stop`` while inside; a second signal has its usual effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        stop.set()
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in previous:
        signal.signal(each, handle)
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
