"""Brings back a model whose stub is dead or whose engine hangs, or a server that ended: so often, and no more."""

from __future__ import annotations

import time
from collections import deque

from toolchain.core.errors import ToolchainError
from toolchain.triton.client import RequestFailed
from toolchain.triton.load import load_model, unload_model
from toolchain.triton.probes import probe_engine
from toolchain.triton.server import TritonServer
from toolchain.triton.server_log import log_end
from toolchain.triton.stubs import descendants, find_stubs, kill, kill_tree

POLL_S = 0.1
RETRY_S = 1.0
"""Between two tries; as long may a server take to end whose connections have."""
RESTART_TIMEOUT_S = 120.0
"""How long model.py of target local may take to start its engine process again before the model is reloaded."""


class GaveUp(ToolchainError):
    """A model, or the server, could not be brought back."""

    exit_code = 4


class Recovery:
    """At most ``max_recoveries`` within ``window_s``, counted over all models of ``server``."""

    def __init__(
        self, server: TritonServer, *, max_recoveries: int, window_s: float, ready_timeout_s: float
    ) -> None:
        self._server = server
        self._max = max_recoveries
        self._window_s = window_s
        self._ready_timeout_s = ready_timeout_s
        self._moments: deque[float] = deque()

    def recover(self, model: str, *, hung: bool) -> bool:
        """True once ``model`` has answered an inference; False where the server has ended meanwhile, which takes
        ``restart_server``: a dead stub can take it along, also while the model is loaded again. GaveUp TC-630 when it
        was tried, or failed, too often.

        ``hung``: the stub is well, only its engine is not: the engine process is killed, and model.py answers the
        requests that waited for it and starts another.
        """
        problem = ""
        while True:
            self._count(model, problem, "TC-630")
            try:
                if not (hung and self._restart_engine(model)):
                    self._reload(model)
                probe_engine(self._server.grpc_url, model, timeout_s=self._ready_timeout_s)
            except ToolchainError as error:
                if self._server.has_ended(within_s=RETRY_S):
                    self._moments.pop()  # what is brought back is the server: counted there, once for all models
                    return False
                problem, hung = error.message, False
            else:
                return True

    def restart_server(self) -> None:
        """Start tritonserver again, which ended by itself. GaveUp TC-632."""
        problem = ""
        while True:
            self._count("tritonserver", problem, "TC-632")
            try:
                self._server.restart()
            except ToolchainError as error:
                problem = error.message
                time.sleep(RETRY_S)
            else:
                return

    def _count(self, model: str, problem: str, code: str) -> None:
        now = time.monotonic()
        while self._moments and now - self._moments[0] > self._window_s:
            self._moments.popleft()
        if len(self._moments) >= self._max:
            last = f": {problem}" if problem else ""
            raise GaveUp(
                f"{model} was brought back {self._max} times within {self._window_s:g} s and is down again{last}\n"
                f"{log_end(self._server.log_file)}",
                hint="its engine or this machine is at fault; --max-recoveries allows more",
                code=code,
            )
        self._moments.append(now)

    def _restart_engine(self, model: str) -> bool:
        """Kill the engine processes under the stubs and wait for new ones; False where there are none, or none came."""
        killed = [pid for pid in self._stub_pids(model) for pid in descendants(pid)]
        if not killed:
            return False
        for pid in killed:
            kill(pid)
        deadline = time.monotonic() + min(RESTART_TIMEOUT_S, self._ready_timeout_s)
        while time.monotonic() < deadline:
            try:
                probe_engine(self._server.grpc_url, model, timeout_s=max(1.0, deadline - time.monotonic()))
            except RequestFailed:
                if self._server.has_ended(within_s=POLL_S):
                    return False
            else:
                return True
        return False

    def _reload(self, model: str) -> None:
        for pid in self._stub_pids(model):
            kill_tree(pid)
        unload_model(self._server.grpc_url, model)
        load_model(self._server.grpc_url, model, timeout_s=self._ready_timeout_s)

    def _stub_pids(self, model: str) -> list[int]:
        process = self._server.process
        if process is None:
            return []
        return [stub.pid for stub in find_stubs(process.pid) if stub.model == model]
