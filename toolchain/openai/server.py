"""The endpoint as a part of the serving process: uvicorn in a thread of its own."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from toolchain.core.errors import UsageError
from toolchain.openai.keys import refuse_exposed
from toolchain.openai.running import POLL_S, Running
from toolchain.openai.settings import Bounds, ServedModel
from toolchain.openai.texts import Texts

BACKLOG = 2048


class OpenAiServer:
    """An OpenAI-compatible endpoint over a Triton server that answers already. A context manager.

    Every method may be called from any thread.
    """

    def __init__(
        self,
        *,
        grpc_url: str,
        models: Mapping[str, ServedModel],
        host: str = "127.0.0.1",
        port: int = 0,
        api_keys: Sequence[str] = (),
        without_key: bool = False,
        bounds: Bounds | None = None,
    ) -> None:
        """``grpc_url``: host:port of Triton. ``models``: by their names in Triton. ``port`` 0 chooses a free one.

        ``api_keys``: any of them opens the endpoint (``read_api_keys``); none is needed on loopback.
        ``without_key``: open to everyone on another address, which is refused otherwise.

        Raises UsageError: TC-643 for an open address without a key, TC-207 for a tokenizer that cannot be used,
        TC-644 for a chat template that cannot be read.
        """
        refuse_exposed(host, api_keys, without_key=without_key)
        self.host = host
        self._grpc_url = grpc_url
        self._models = dict(models)
        self._wanted_port = port
        self._api_keys = tuple(api_keys)
        self._bounds = bounds or Bounds()
        self._texts = {name: Texts(served) for name, served in self._models.items()}
        self._running: Running | None = None

    @property
    def port(self) -> int:
        return self._wanted_port if self._running is None else self._running.port

    @property
    def url(self) -> str:
        """``http://host:port``; clients add ``/v1``."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def start(self) -> Self:
        """Listen. Raises UsageError TC-624 for a port in use, ToolchainError TC-645 when it does not come up."""
        listening = _listen(self.host, self._wanted_port)
        self._running = Running(
            self._grpc_url, self._models, self._texts, listening, self._api_keys, self._bounds
        )
        self._running.start()
        return self

    def fail_requests(self, model: str, reason: str) -> int:
        """End the running requests of ``model`` (its name in Triton) at once with ``reason``; how many they were.

        New requests are taken as before: the model answers them itself.
        """
        return 0 if self._running is None else self._running.fail(model, reason)

    def drain(self, timeout_s: float) -> int:
        """Answer new requests with 503, let running ones end, then stop; how many had to be cut after ``timeout_s``.

        Call it before Triton gets its SIGTERM: answers that run come through Triton.
        """
        running = self._running
        if running is None:
            return 0
        running.refuse_new()
        deadline = time.monotonic() + timeout_s
        while running.in_flight and time.monotonic() < deadline:
            time.sleep(POLL_S)
        cut = running.in_flight
        self.stop()
        return cut

    def stop(self) -> None:
        """End at once: running requests get an error. Does nothing when it has stopped already."""
        running, self._running = self._running, None
        if running is None:
            return
        self._wanted_port = running.port
        running.refuse_new()
        running.stop()
        for texts in self._texts.values():
            texts.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is told before anything starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it each answer waits 40 ms for an ACK.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise UsageError(
            f"the OpenAI endpoint cannot listen on {host} port {port}: {error.strerror or error}",
            hint="choose another port, or 0 for any free one",
            code="TC-624",
        ) from error
    return listening
