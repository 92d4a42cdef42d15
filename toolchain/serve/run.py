"""``toolchain serve``: engines on a supervised tritonserver in the foreground, until it is told to stop."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.findings import errors
from toolchain.core.progress import Progress, Silent
from toolchain.serve.admin import AdminServer
from toolchain.serve.health import Health
from toolchain.serve.signals import Interrupted, handled
from toolchain.serve.state import announced
from toolchain.serve.supervise import SupervisionSettings, Supervisor
from toolchain.triton.engine_dir import EngineDir, read_engine_dir
from toolchain.triton.freshness import refuse_stale_repository
from toolchain.triton.inflight_launch import refuse_here
from toolchain.triton.lint import lint_repository
from toolchain.triton.render import name_models
from toolchain.triton.server import LOOPBACK, TritonServer

CHECK_S = 0.5


class Exit(IntEnum):
    """Exit status of ``toolchain serve``, beside 1 (failed), 2 (wrong usage) and 4 (GaveUp)."""

    DRAINED = 0
    CUT = 3
    """Streams still ran when the drain timeout was over."""


@dataclass(frozen=True, kw_only=True)
class Ports:
    """0 chooses a free one."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    status: int = 8003


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    address: str = LOOPBACK
    log_file: Path | None = None
    ready_timeout_s: float = 1800.0
    drain_timeout_s: int = 30
    """How long running streams may take to end after SIGTERM; at least 5."""
    supervision: SupervisionSettings = field(default_factory=SupervisionSettings)


class Frontend(Protocol):
    """Another endpoint over the same server, such as the OpenAI one. Listens already."""

    @property
    def url(self) -> str: ...

    def fail_requests(self, model: str, reason: str) -> int: ...

    def drain(self, timeout_s: float) -> int: ...

    def stop(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What serves, once it does."""

    server: TritonServer
    status_url: str
    openai_url: str


def serve_engine(
    engine_dir: Path | Sequence[Path],
    repository: Path,
    ports: Ports,
    on_ready: Callable[[Serving], None],
    *,
    options: ServeOptions | None = None,
    model_name: str | None = None,
    frontend: Callable[[TritonServer], Frontend] | None = None,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
) -> Exit:
    """Serve until SIGINT, SIGTERM or ``stop``; ``on_ready`` is called once every model has answered an inference.

    ``frontend(server)`` starts a further endpoint, which is drained before the server.

    Raises UsageError when ``repository`` was not rendered, FindingsError when its lint fails, ToolchainError when the
    server does not start, GaveUp (exit status 4) for a model or a server that cannot be brought back, and Interrupted
    for a second signal: everything has ended by then.
    """
    options, progress = options or ServeOptions(), progress or Silent()
    engines = _checked_engines(engine_dir, repository, model_name)
    stop = stop or threading.Event()
    server = TritonServer(
        repository,
        http_port=ports.http,
        grpc_port=ports.grpc,
        metrics_port=ports.metrics,
        address=options.address,
        log_file=options.log_file,
        ready_timeout_s=options.ready_timeout_s,
        exit_timeout_s=options.drain_timeout_s,
        progress=progress,
    )
    health = Health(tuple(engines))
    admin = AdminServer(health, dict, host=options.address, port=ports.status)
    with handled(stop) as stopping, contextlib.ExitStack() as stack:
        stack.callback(admin.stop)
        admin.start()  # alive, not ready: loading may take long, and someone may wait for it
        try:
            server.start()
            stack.callback(server.kill)
            front = frontend(server) if frontend else None
        except Interrupted:
            progress.note("stopped before it served")
            return Exit.DRAINED
        if front is not None:
            stack.callback(front.stop)
        stopping.serving = True
        return _run(_Parts(server, front, admin, health, options, progress), on_ready, stop)


@dataclass
class _Parts:
    server: TritonServer
    front: Frontend | None
    admin: AdminServer
    health: Health
    options: ServeOptions
    progress: Progress


def _run(parts: _Parts, on_ready: Callable[[Serving], None], stop: threading.Event) -> Exit:
    """From ready to ended; ``stop`` is set by a signal, by the caller or by the supervisor that gave up."""
    server, front, admin = parts.server, parts.front, parts.admin
    names = tuple(model["name"] for model in parts.health.snapshot()["models"])
    supervisor = Supervisor(
        server,
        names,
        parts.options.supervision,
        health=parts.health,
        on_down=lambda model, reason: _tell(front, model, reason),
        progress=parts.progress,
        ended=stop,
    )
    host = server.http_url.removeprefix("http://").rpartition(":")[0]
    serving = Serving(
        server=server,
        status_url=f"http://{host}:{admin.port}",
        openai_url=front.url if front else "",
    )
    facts = {
        "repository": str(server.repository),
        "log": str(server.log_file.absolute()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "http": server.http_url,
        "grpc": server.grpc_url,
        "metrics": server.metrics_url,
        "status": serving.status_url,
        "openai": serving.openai_url,
    }
    admin.facts = lambda: dict(facts)
    with announced(**facts):
        supervisor.start()
        for name in names:
            parts.health.update(name, last_probe=time.time())
        parts.health.serving = True
        on_ready(serving)
        while not stop.wait(CHECK_S):
            pass
        supervisor.stop()
        if supervisor.restarting:
            server.kill()  # nothing runs that could be drained
        ending = _drain(parts)
    if supervisor.failure is not None:
        raise supervisor.failure
    return ending


def _tell(front: Frontend | None, model: str, reason: str) -> None:
    if front is not None:
        front.fail_requests(model, reason)


def _drain(parts: _Parts) -> Exit:
    """No new requests, running streams to their end: first at the endpoint in front, then at the server."""
    parts.health.draining = True
    timeout_s = float(parts.options.drain_timeout_s)
    parts.progress.note(
        f"draining: running streams have {timeout_s:g} s to end; a second signal ends them at once"
    )
    started = time.monotonic()
    cut = parts.front.drain(timeout_s) if parts.front else 0
    ending = parts.server.end(max(0.0, timeout_s - (time.monotonic() - started)))
    if cut or ending != "drained":
        parts.progress.note(f"streams still ran after {timeout_s:g} s and were cut")
        return Exit.CUT
    return Exit.DRAINED


def _checked_engines(
    engine_dir: Path | Sequence[Path], repository: Path, model_name: str | None
) -> Mapping[str, EngineDir]:
    """The engines by the names of their models, all of which ``repository`` holds, sound and fresh."""
    paths = [engine_dir] if isinstance(engine_dir, Path) else list(engine_dir)
    engines = name_models([read_engine_dir(path) for path in paths], model_name)
    if not repository.is_dir():
        raise UsageError(
            f"no model repository {repository} for engine {', '.join(item.name for item in engines.values())}",
            hint="`toolchain triton` renders it",
            code="TC-604",
        )
    problems = errors(lint_repository(repository))
    if problems:
        raise FindingsError(f"{repository} cannot be served", problems, hint="render it again", code="TC-602")
    refuse_stale_repository(engines, repository)
    for engine in engines.values():
        if engine.target == "tensorrt":
            refuse_here(engine, repository)
    return engines
