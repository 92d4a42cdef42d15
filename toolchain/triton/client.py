"""A small client of the ``tensorrt_llm`` model over gRPC streaming, with the deadline that every request
needs.

A stub that crashes in mid-stream leaves its clients waiting for ever and the server reports itself ready all
the while, so no wait here is unbounded.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from toolchain.core.errors import ToolchainError
from toolchain.triton.contract import INPUTS, MODEL_NAME

WIRE_TYPES = {
    "TYPE_STRING": ("BYTES", "object"),
    "TYPE_BOOL": ("BOOL", "bool"),
    "TYPE_INT32": ("INT32", "int32"),
    "TYPE_UINT64": ("UINT64", "uint64"),
    "TYPE_FP32": ("FP32", "float32"),
}
"""config.pbtxt type -> (type on the wire, numpy dtype)."""
FINAL_AFTER_ERROR_S = 0.5


class RequestFailed(ToolchainError):
    """The server answered a request with an error, or not in time."""


class ModelError(RequestFailed):
    """The server answered with an error."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One response of a streaming request."""

    text: str
    received_s: float
    """time.perf_counter() at its arrival."""
    finish_reason: str | None = None


class GenerateClient:
    """One connection with one stream: requests one after the other. Use one client per concurrent request."""

    def __init__(self, url: str, *, model: str = MODEL_NAME, version: str = "") -> None:
        """``url``: host:port of the gRPC endpoint. ``version``: empty lets the server choose."""
        from tritonclient import grpc

        self._client = grpc.InferenceServerClient(url)
        self._url = url
        self._model = model
        self._version = version
        self._answers: queue.Queue[tuple[float, Any, Any]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream and the connection."""
        self._end_stream(cancel=False)
        self._client.close()

    def stream(
        self, text_input: str, *, timeout_s: float, request_id: str = "", **inputs: Any
    ) -> Iterator[Piece]:
        """Yield the answer in pieces; the last one has ``finish_reason``. ``inputs``: by their names in the
        contract.

        Leaving the iterator early cancels the request. Raises RequestFailed on an error or after
        ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        answers = self._open_stream()
        self._send(
            {"streaming": True, "return_finish_reason": True, **inputs, "text_input": text_input}, request_id
        )
        done = False
        try:
            while not done:
                piece, done = self._next(answers, deadline, timeout_s)
                if piece is not None:
                    yield piece
        except ModelError:
            done = self._is_over(answers)
            raise
        finally:
            if not done:
                self._end_stream(cancel=True)

    def _send(self, inputs: dict[str, Any], request_id: str) -> None:
        """RequestFailed where the stream has ended already: nobody listens at the other end."""
        from tritonclient.utils import InferenceServerException

        try:
            self._client.async_stream_infer(
                self._model,
                _tensors(inputs),
                model_version=self._version,
                request_id=request_id,
                enable_empty_final_response=True,
            )
        except InferenceServerException as error:
            self._end_stream(cancel=True)
            raise RequestFailed(
                f"{self._model} at {self._url} cannot be reached: {error.message()}",
                hint="see whether the server runs",
                code="TC-702",
            ) from error

    def _is_over(self, answers: queue.Queue[Any]) -> bool:
        """Whether the final flag follows an error. Errors of the server's core come without one."""
        with contextlib.suppress(queue.Empty):
            _, result, _ = answers.get(timeout=FINAL_AFTER_ERROR_S)
            return result is not None and _is_final(result)
        return False

    def _next(
        self, answers: queue.Queue[Any], deadline: float, timeout_s: float
    ) -> tuple[Piece | None, bool]:
        try:
            received_s, result, error = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise RequestFailed(
                f"{self._model} at {self._url} did not finish its answer within {timeout_s:g} s",
                hint="look into the server's log; a longer answer needs a longer timeout",
                code="TC-702",
            ) from None
        if error is not None:
            raise ModelError(f"{self._model} at {self._url}: {error.message()}", code="TC-702")
        final = _is_final(result)
        text = result.as_numpy("text_output")
        if text is None:
            return None, final
        reason = result.as_numpy("finish_reason")
        piece = Piece(
            text=b"".join(text.reshape(-1)).decode("utf-8", errors="replace"),
            received_s=received_s,
            finish_reason=None if reason is None else reason.reshape(-1)[0].decode(),
        )
        return piece, final

    def _open_stream(self) -> queue.Queue[tuple[float, Any, Any]]:
        if self._answers is None:
            answers: queue.Queue[tuple[float, Any, Any]] = queue.Queue()
            self._client.start_stream(lambda result, error: answers.put((time.perf_counter(), result, error)))
            self._answers = answers
        return self._answers

    def _end_stream(self, *, cancel: bool) -> None:
        """Late answers go into the abandoned queue, never into that of the next request.

        ``cancel`` only where a request still runs: a stream that is cancelled in the moment in which its request
        ends can keep tritonserver 2.51 from ever unloading the model.
        """
        from tritonclient.utils import InferenceServerException

        if self._answers is not None:
            self._answers = None
            with contextlib.suppress(InferenceServerException):
                self._client.stop_stream(cancel_requests=cancel)


def _is_final(result: Any) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def _tensors(inputs: dict[str, Any]) -> list[Any]:
    """InferInputs of the named values; a str or a list of str for strings, scalars for the rest."""
    import numpy as np
    from tritonclient import grpc

    types = {tensor.name: tensor.data_type for tensor in INPUTS}
    tensors = []
    for name, value in inputs.items():
        wire_type, dtype = WIRE_TYPES[types[name]]
        values = value if isinstance(value, list | tuple) else [value]
        if wire_type == "BYTES":
            values = [item.encode("utf-8") for item in values]
        tensor = grpc.InferInput(name, [len(values)], wire_type)
        tensor.set_data_from_numpy(np.array(values, dtype=dtype))
        tensors.append(tensor)
    return tensors
