"""A tritonserver process: started on a model repository, known to answer, stopped without leaving anything
behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress, Silent
from toolchain.triton.client import RequestFailed
from toolchain.triton.guard import Guard
from toolchain.triton.install import require_server
from toolchain.triton.model_dir import model_names, text_models
from toolchain.triton.ports import check_free, choose_free
from toolchain.triton.probes import probe_engine
from toolchain.triton.server_log import log_end
from toolchain.triton.sessions import end_session
from toolchain.triton.stubs import find_stubs

LOOPBACK = "127.0.0.1"
POLL_S = 0.1
KILL_AFTER_S = 3.0
"""How much longer than its own exit timeout a server may take to end."""
WITHOUT_STUBS_S = 2.0
"""tritonserver ends within a second after its last stub, unless a dead one left requests behind."""
Ending = Literal["drained", "cut", "killed"]
SHM = Path("/dev/shm")


class TritonServer:
    """Context manager of a tritonserver that serves ``repository``.

    Ports of 0 are chosen free. ``log_file`` defaults to ``<repository>.log`` beside the repository.
    ``exit_timeout_s`` (>= 5) is how long running requests may take to end after ``stop``.
    """

    def __init__(
        self,
        repository: Path,
        *,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        address: str = LOOPBACK,
        log_file: Path | None = None,
        ready_timeout_s: float = 1800.0,
        exit_timeout_s: int = 10,
        progress: Progress | None = None,
    ) -> None:
        self.repository = repository.absolute()
        self.address = address
        self.log_file = log_file or self.repository.with_name(f"{self.repository.name}.log")
        self.process: subprocess.Popen[bytes] | None = None
        self.models: tuple[str, ...] = model_names(self.repository)
        self._wanted_ports = (http_port, grpc_port, metrics_port)
        self._ready_timeout_s = ready_timeout_s
        self._exit_timeout_s = max(5, exit_timeout_s)
        self._progress = progress or Silent()
        self._life = threading.Lock()
        self._started = False
        self._closed = False
        """Set when it is ended: a restart that is under way in another thread must not bring it back."""
        self._guard: Guard | None = None
        self._shm_prefix = f"toolchain_{os.getpid()}_{secrets.token_hex(4)}_"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def http_url(self) -> str:
        return f"http://{self._client_host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """host:port, as tritonclient wants it."""
        return f"{self._client_host}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._client_host}:{self.metrics_port}/metrics"

    @property
    def _client_host(self) -> str:
        return LOOPBACK if self.address in ("0.0.0.0", "") else self.address

    def start(self) -> Self:
        """Start it and wait for an answer to a real inference.

        Raises UsageError for a port in use, ToolchainError (with the end of the log) when it exits or stays
        silent.
        """
        installation = require_server()
        check_free(self.address, *self._wanted_ports)
        self.http_port, self.grpc_port, self.metrics_port = choose_free(self.address, *self._wanted_ports)
        command = [str(installation.binary), *installation.arguments, *self._arguments()]
        self._progress.note(f"starting {installation.description}; log: {self.log_file}")
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._life:
            if self._closed:
                raise ToolchainError("tritonserver was told to stop", code="TC-622")
            with self.log_file.open("ab" if self._started else "wb") as log:
                self.process = self._spawn(command, installation.environ(), log)
                self._guard = Guard(
                    self.process.pid,
                    shm_prefix=str(SHM / self._shm_prefix),
                    grace_s=self._exit_timeout_s + KILL_AFTER_S,
                )
            self._started = True
        try:
            self._wait_until_it_answers()
        except BaseException:
            self._reap()
            raise
        return self

    def restart(self) -> None:
        """Start it again on the same ports after it ended by itself; the log goes on. Raises what ``start`` raises."""
        self._reap()
        self._wanted_ports = (self.http_port, self.grpc_port, self.metrics_port)
        self.start()

    def _arguments(self) -> list[str]:
        """Never ``--disable-auto-complete-config``: the llmapi layout gets its batch size and policy that
        way."""
        arguments = [f"--model-repository={self.repository}", f"--exit-timeout-secs={self._exit_timeout_s}"]
        # Explicit: the only mode in which a model can be loaded again, by whoever finds it dead or updates it.
        arguments += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in self.models)]
        for name in ("http", "grpc", "metrics"):
            arguments += [
                f"--{name}-address={self.address}",
                f"--{name}-port={getattr(self, f'{name}_port')}",
            ]
        # A prefix of its own, so that cleaning up cannot hit the shared memory of another server.
        arguments += [f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}"]
        if not Path("/dev/nvidiactl").exists():
            arguments += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
            arguments += ["--cuda-memory-pool-byte-size=0:0"]
        return arguments

    def _spawn(
        self, command: list[str], environment: dict[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """In a session of its own: Ctrl-C reaches only us, and all its processes can be found again."""
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while not self._reports_ready():
            self.check_running()
            if time.monotonic() > deadline:
                raise self._silent("is not ready")
            time.sleep(POLL_S)
        try:
            self.probe(timeout_s=max(1.0, deadline - time.monotonic()))
        except RequestFailed as error:
            self.check_running()
            raise self._silent(f"is ready but fails a first inference ({error.message})") from error

    def _reports_ready(self) -> bool:
        import requests

        try:
            return requests.get(f"{self.http_url}/v2/health/ready", timeout=2.0).status_code == 200
        except requests.RequestException:
            return False

    def probe(self, *, timeout_s: float) -> None:
        """One token of text from every model for text; RequestFailed otherwise. Readiness alone says nothing about
        a model."""
        for model in text_models(self.repository):
            probe_engine(self.grpc_url, model, timeout_s=timeout_s)

    def check_running(self) -> None:
        """ToolchainError with the end of the log when the process has ended."""
        process = self.process
        if process is not None and process.poll() is None:
            return
        status = "as it was told to" if process is None else f"with status {process.returncode}"
        raise ToolchainError(
            f"tritonserver ended {status}; {log_end(self.log_file)}",
            code="TC-622",
        )

    def has_ended(self, *, within_s: float) -> bool:
        """Whether the process has ended, or does within that time."""
        process = self.process
        if process is None:
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(within_s)
        return process.poll() is not None

    def _silent(self, what: str) -> ToolchainError:
        return ToolchainError(
            f"tritonserver {what} after {self._ready_timeout_s:g} s; {log_end(self.log_file)}", code="TC-623"
        )

    def stop(self) -> None:
        """SIGTERM, wait for running requests, then make sure that no process and no shared memory is left.

        Raises ToolchainError when it had to be killed.
        """
        if self.end() == "killed":
            raise ToolchainError(
                f"tritonserver did not stop within {self._exit_timeout_s + KILL_AFTER_S:g} s and was killed",
                hint=f"see {self.log_file}",
                code="TC-625",
            )

    def end(self, timeout_s: float | None = None) -> Ending:
        """Like ``stop``, and says how: ``drained`` (every running request ended), ``cut`` or ``killed``.

        ``timeout_s``: less than its exit timeout, when part of that is used up.

        Requests that a dead stub left behind keep tritonserver until its exit timeout, although nobody will answer
        them; the models that still ran have been unloaded by then, and their stubs have ended.
        """
        with self._life:
            self._closed = True
        process = self.process
        if process is None:
            return "drained"
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        allowed_s = self._exit_timeout_s if timeout_s is None else min(timeout_s, self._exit_timeout_s)
        deadline = time.monotonic() + allowed_s + KILL_AFTER_S
        stubs_seen = time.monotonic()
        while process.poll() is None and time.monotonic() < deadline:
            if find_stubs(process.pid):
                stubs_seen = time.monotonic()
            elif time.monotonic() - stubs_seen > WITHOUT_STUBS_S:
                break
            time.sleep(POLL_S)
        unloaded = time.monotonic() - stubs_seen > 2 * POLL_S
        ending: Ending = "drained" if process.poll() == 0 or unloaded else "cut"
        if process.poll() is None and not unloaded:
            ending = "killed"
        self.kill()
        return ending

    def kill(self) -> None:
        """End it at once, with all its processes and its shared memory. Nothing when it has ended."""
        with self._life:
            self._closed = True
        self._reap()

    def _reap(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        process.wait()
        end_session(process.pid)
        for region in SHM.glob(f"{self._shm_prefix}*"):
            with contextlib.suppress(FileNotFoundError):
                region.unlink()
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.dismiss()
