"""uvicorn with the application, in a thread of the serving process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import uvicorn

from toolchain.core.errors import ToolchainError
from toolchain.openai.app import Endpoint, make_app
from toolchain.openai.gate import Gate
from toolchain.openai.metrics import Metrics
from toolchain.openai.settings import Bounds, ServedModel
from toolchain.openai.texts import Texts
from toolchain.openai.upstream import GRACE_S, Upstream

START_TIMEOUT_S = 20.0
KEEP_ALIVE_S = 75
"""Longer than what clients keep idle connections for: else they meet connections that were just closed."""
POLL_S = 0.02


class Running:
    """uvicorn, the application and the connection to Triton: all of them live in one event loop in one thread."""

    def __init__(
        self,
        grpc_url: str,
        models: Mapping[str, ServedModel],
        texts: Mapping[str, Texts],
        listening: socket.socket,
        api_keys: Sequence[str],
        bounds: Bounds,
    ) -> None:
        self._grpc_url = grpc_url
        self._models = models
        self._texts = texts
        self._socket = listening
        self._api_keys = api_keys
        self._bounds = bounds
        self.port: int = listening.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="openai-endpoint", daemon=True)
        self._up = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        self._thread.start()
        up = self._up.wait(START_TIMEOUT_S)
        if self._error is not None or not up:
            reason = repr(self._error) if self._error else f"it was silent for {START_TIMEOUT_S:g} s"
            raise ToolchainError(f"the OpenAI endpoint did not start: {reason}", code="TC-645")

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except (Exception, SystemExit) as error:  # noqa: BLE001 - told by start(), or by the log when it comes later
            self._error = error
        finally:
            self._socket.close()
            self._up.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        metrics = Metrics()
        self._upstream = Upstream(self._grpc_url, self._bounds)
        self._endpoint = Endpoint(
            self._upstream, self._models, self._texts, bounds=self._bounds, metrics=metrics
        )
        self._gate = Gate(
            make_app(self._endpoint), api_keys=self._api_keys, bounds=self._bounds, metrics=metrics
        )
        config = uvicorn.Config(
            self._gate,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            # Neither who asks nor over which scheme is taken from headers that anyone can send.
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(GRACE_S),
        )
        self._server = _Server(config, self._up)
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            await self._upstream.close()

    @property
    def in_flight(self) -> int:
        return self._gate.in_flight

    def refuse_new(self) -> None:
        self._gate.draining = self._endpoint.draining = True

    def fail(self, model: str, reason: str) -> int:
        async def fail() -> int:
            return self._upstream.fail(model, reason)

        return self._call(fail())

    def stop(self) -> None:
        async def fail_all() -> int:
            return self._upstream.fail_all("the server is shutting down")

        self._call(fail_all())
        deadline = time.monotonic() + GRACE_S
        while self.in_flight and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self._server.should_exit = True
        self._thread.join(3 * GRACE_S + 1)

    def _call(self, work: Coroutine[Any, Any, int]) -> int:
        """Run ``work`` in the endpoint's loop; 0 where that has ended already."""
        if self._loop is None or not self._thread.is_alive():
            work.close()
            return 0
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(GRACE_S)
        except (RuntimeError, TimeoutError):
            return 0


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, up: threading.Event) -> None:
        super().__init__(config)
        self._is_up = up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._is_up.set()
