"""The endpoint as a part of the serving process: uvicorn in a thread of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from toolchain.openai.keys import refuse_exposed
from toolchain.openai.settings import Bounds, ServedModel


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

    @property
    def url(self) -> str:
        """``http://host:port``; clients add ``/v1``."""
        raise NotImplementedError

    def start(self) -> Self:
        """Listen. Raises UsageError TC-624 for a port in use, ToolchainError TC-645 when it does not come up."""
        raise NotImplementedError

    def fail_requests(self, model: str, reason: str) -> int:
        """End the running requests of ``model`` (its name in Triton) at once with ``reason``; how many they were.

        New requests are taken as before: the model answers them itself.
        """
        raise NotImplementedError

    def drain(self, timeout_s: float) -> int:
        """Answer new requests with 503, let running ones end, then stop; how many had to be cut after ``timeout_s``.

        Call it before Triton gets its SIGTERM: answers that run come through Triton.
        """
        raise NotImplementedError

    def stop(self) -> None:
        """End at once: running requests get an error. Does nothing when it has stopped already."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
