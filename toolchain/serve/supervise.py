"""Supervision of one tritonserver: finds models that do not answer any more, and brings them back.

Triton reports a model ready whose stub has died, and never starts it again. Three signs are watched: the stubs in the
process table (four times a second), the answer of each stub, and the tokens of each engine (every probe interval).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress
from toolchain.serve.health import Health
from toolchain.serve.recovery import Recovery
from toolchain.serve.watch import ModelWatch, Verdict
from toolchain.triton.probes import ModelLoad, read_load, ready_versions
from toolchain.triton.server import TritonServer
from toolchain.triton.stubs import Stub, find_stubs

WATCH_S = 0.25
OnDown = Callable[[str, str], None]


@dataclass(frozen=True, kw_only=True)
class SupervisionSettings:
    probe_interval_s: float = 2.0
    hang_timeout_s: float = 60.0
    """How long an engine may generate nothing while a request waits, before it is taken for hung."""
    max_recoveries: int = 5
    """Recoveries of all models within ``window_s``; one more ends the server."""
    window_s: float = 600.0
    ready_timeout_s: float = 1800.0
    """How long a model may take to load again."""


class Supervisor:
    """A thread that watches ``server``. ``on_down(model, reason)`` is called when a model is found dead or hung: its
    running requests will never be answered.

    ``failure`` is set, and ``ended``, when it has to give up: a model, or the server, does not come back.
    """

    def __init__(
        self,
        server: TritonServer,
        models: tuple[str, ...],
        settings: SupervisionSettings,
        *,
        health: Health,
        on_down: OnDown,
        progress: Progress,
        ended: threading.Event,
    ) -> None:
        self.health = health
        self.failure: ToolchainError | None = None
        self.restarting = False
        """Whether there is no server at this moment."""
        self.ended = ended
        self._server = server
        self._settings = settings
        self._on_down = on_down
        self._progress = progress
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=len(models), thread_name_prefix="probe")
        self._watches = {
            name: ModelWatch(
                name=name,
                server=server,
                health=health,
                hang_timeout_s=settings.hang_timeout_s,
                pool=self._pool,
            )
            for name in models
        }
        self._recovery = Recovery(
            server,
            max_recoveries=settings.max_recoveries,
            window_s=settings.window_s,
            ready_timeout_s=settings.ready_timeout_s,
        )
        self._stubs: dict[int, Stub] = {}
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._remember_stubs()
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer. A recovery that is under way is left to itself: the server is about to end."""
        self._stopping.set()
        self._thread.join(timeout=1.0)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        probe_at = time.monotonic() + self._settings.probe_interval_s
        while not self._stopping.wait(WATCH_S):
            try:
                self._keep_server()
                for stub in self._vanished():
                    reason = f"stub {stub.instance} (pid {stub.pid}) ended"
                    if not self._recover(stub.model, Verdict.DEAD, reason):
                        break
                if time.monotonic() >= probe_at:
                    self._probe()
                    probe_at = time.monotonic() + self._settings.probe_interval_s
            except Exception as error:  # noqa: BLE001 - a server that nobody watches any more must not look well
                if not self._stopping.is_set():
                    self.failure = _failure(error)
                    self.ended.set()
                return

    def _keep_server(self) -> None:
        """Start the server again when it has ended: a stub that dies while it holds a lock takes it along."""
        try:
            self._server.check_running()
        except ToolchainError as error:
            self.restarting = True
            for name in self._watches:
                self._down(name, "tritonserver ended")
            self._progress.note(f"{error.message}\nstarting it again")
            self._recovery.restart_server()
            self.restarting = False
            for name in self._watches:
                self._up(name)

    def _vanished(self) -> list[Stub]:
        """One stub per model that has gone although its version is said to be ready: it died."""
        process = self._server.process
        if process is None:
            return []
        there = {stub.pid: stub for stub in find_stubs(process.pid)}
        gone = [stub for pid, stub in self._stubs.items() if pid not in there]
        self._stubs = there
        dead: dict[str, Stub] = {}
        for stub in gone:
            # Of a version that was unloaded, by an update or by hand, nothing is missing.
            if stub.model in self._watches and stub.version in self._ready(stub.model):
                dead[stub.model] = stub
        return list(dead.values())

    def _ready(self, model: str) -> list[int]:
        try:
            return ready_versions(self._server.grpc_url, model)
        except ToolchainError as error:
            self._progress.note(f"{model}: {error.message}")
            return []

    def _probe(self) -> None:
        loads: dict[str, ModelLoad] | None = None
        try:
            loads = read_load(self._server.metrics_url)
        except ToolchainError as error:
            self._progress.note(error.message)
        for name, watch in self._watches.items():
            load = None if loads is None else loads.get(name)
            verdict, reason = watch.check(load)
            if verdict is not Verdict.FINE and self._ready(name) and not self._recover(name, verdict, reason):
                break

    def _recover(self, model: str, verdict: Verdict, reason: str) -> bool:
        """False where the server has to be started again first, and every model with it; or is about to end."""
        if self._stopping.is_set():
            return False
        started = time.monotonic()
        self._progress.note(f"{model} is {verdict.value}: {reason}; bringing it back")
        self._down(model, reason)
        if not self._recovery.recover(model, hung=verdict is Verdict.HUNG):
            return False
        self._up(model)
        self._progress.note(f"{model} answers again after {time.monotonic() - started:.1f} s")
        return True

    def _down(self, model: str, reason: str) -> None:
        self.health.update(model, up=False, reason=reason)
        self.health.recovered(model)
        self._on_down(model, reason)

    def _up(self, model: str) -> None:
        self._watches[model].reset()
        self.health.update(model, up=True, reason="", last_probe=time.time())
        self._remember_stubs()

    def _remember_stubs(self) -> None:
        process = self._server.process
        self._stubs = {stub.pid: stub for stub in find_stubs(process.pid)} if process else {}


def _failure(error: Exception) -> ToolchainError:
    if isinstance(error, ToolchainError):
        return error
    failure = ToolchainError(f"the supervision failed: {type(error).__name__}: {error}", code="TC-636")
    failure.__cause__ = error
    return failure
