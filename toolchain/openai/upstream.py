"""The Triton server behind the endpoint: one gRPC stream per generation, on one connection.

A generation that nobody wants any more is ended by the model's own ``stop`` input, not by cancelling its stream:
tritonserver 2.51 can keep a model for ever whose stream is cancelled in the moment in which its request ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Mapping
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from toolchain.openai.failures import ApiError, from_model, timed_out, unavailable
from toolchain.openai.settings import Bounds
from toolchain.openai.wire import Piece, infer_request, is_final, read_piece

GRACE_S = 2.0
"""How long a stream may take to end after its last response or after ``stop``; then it is cancelled."""
MARGIN_S = 1.5
"""How much longer than the model itself the endpoint waits for the end of a request whose time is over."""
MAX_MESSAGE_BYTES = 2**31 - 1
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A server that is started again on its port is found again within a second.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Upstream:
    """Belongs to the event loop in which it was made."""

    def __init__(self, grpc_url: str, bounds: Bounds) -> None:
        self._channel = grpc.aio.insecure_channel(grpc_url, options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._bounds = bounds
        self._running: dict[str, set[Generation]] = {}
        self.heard: dict[str, float] = {}
        """Model -> time.monotonic() of the last piece that it sent."""
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, model: str, inputs: Mapping[str, Any], *, timeout_s: float | None = None) -> Generation:
        """A generation that starts when its pieces are read. ``timeout_s``: default that of the bounds."""
        limit_s = timeout_s or self._bounds.request_timeout_s
        return Generation(self, model, inputs, timeout_s=limit_s, stall_s=self._bounds.stall_timeout_s)

    def fail(self, model: str, reason: str) -> int:
        """End the generations of ``model`` with ``reason``; how many there were."""
        running = list(self._running.get(model, ()))
        for generation in running:
            generation.fail(reason)
        return len(running)

    def fail_all(self, reason: str) -> int:
        return sum(self.fail(model, reason) for model in list(self._running))

    def call(self) -> Any:
        return self._stub.ModelStreamInfer()

    def entered(self, generation: Generation) -> None:
        self._running.setdefault(generation.model, set()).add(generation)

    def left(self, generation: Generation) -> None:
        """Forget ``generation`` and let its stream end beside whatever its reader does next."""
        self._running.get(generation.model, set()).discard(generation)
        self.spawn(generation.wind_up())

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is kept from being collected, and waited for before the connection closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Wait for streams that are ending, at most GRACE_S, then close the connection."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_S)
        await self._channel.close()


class Generation:
    """One request to the model. ``pieces`` is read once, by one task; the other methods are for the same loop."""

    def __init__(
        self, upstream: Upstream, model: str, inputs: Mapping[str, Any], *, timeout_s: float, stall_s: float
    ) -> None:
        """``timeout_s``: for the whole answer. The model ends it then; where it does not, we do MARGIN_S later."""
        self.model = model
        self.abandoned = False
        self._upstream = upstream
        self._id = uuid.uuid4().hex
        self._request = infer_request(model, self._id, inputs, timeout_s=timeout_s)
        self._deadline = time.monotonic() + timeout_s + MARGIN_S
        self._stall_s = stall_s
        self._call: Any = None
        self._clock: asyncio.Timeout | None = None
        self._failure = ""
        self._stopped = False
        self._stopping: asyncio.Task[None] | None = None
        self._over = False
        self._pieces = 0

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer piece by piece; ends early, without an error, once the generation is abandoned.

        Raises ApiError for what the model or the server answers, 504 after the deadline or a stall.
        """
        if self.abandoned:
            return
        self._upstream.entered(self)
        try:
            self._call = self._upstream.call()
            await self._write(self._request)
            while not self._over:
                piece = await self._next()
                if self.abandoned:
                    return
                if piece is not None:
                    self._pieces += 1
                    self._upstream.heard[self.model] = time.monotonic()
                    yield piece
        finally:
            self._upstream.left(self)

    async def _next(self) -> Piece | None:
        message = await self._read()
        if message is grpc.aio.EOF:
            self._over = True
            if self.abandoned:
                return None
            raise unavailable("the Triton server ended the answer before it was complete")
        if message.error_message:
            # Errors of the server's core come without a final flag; nothing comes after an error in any case.
            self._over = True
            if self.abandoned:
                return None
            raise from_model(message.error_message)
        self._over = is_final(message.infer_response)
        try:
            return read_piece(message.infer_response)
        except ValueError as error:
            raise ApiError(
                500, f"a response of the model cannot be read: {error}", kind="server_error"
            ) from error

    async def _write(self, request: Any) -> None:
        await self._wait(self._call.write(request))

    async def _read(self) -> Any:
        return await self._wait(self._call.read())

    async def _wait(self, awaitable: Awaitable[Any]) -> Any:
        """One message, in its time; ``fail`` and ``abandon`` may shorten it meanwhile. Raises ApiError."""
        left = self._deadline - time.monotonic()
        if self._pieces:
            left = min(left, self._stall_s)
        if self._failure:
            left = 0.0
        clock = asyncio.timeout_at(asyncio.get_running_loop().time() + left)
        try:
            async with clock:
                self._clock = clock
                return await awaitable
        except TimeoutError:
            raise self._late() from None
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise self._broken(error) from error
        finally:
            self._clock = None

    def _late(self) -> ApiError:
        self._stopped = True  # the stream is cancelled by now: nothing is left to be told to the model
        if self._failure:
            return unavailable(self._failure)
        if time.monotonic() >= self._deadline:
            return timed_out(f"no complete answer in time ({self._pieces} pieces came)")
        return timed_out(f"the model was silent for {self._stall_s:g} s after {self._pieces} pieces")

    def _broken(self, error: Any) -> ApiError:
        self._stopped = self._over = True
        if self._failure:
            return unavailable(self._failure)
        detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
        return unavailable(f"the Triton server cannot be reached: {detail}")

    def fail(self, reason: str) -> None:
        """End it with 503 and ``reason``, at once where it waits for the model."""
        self._failure = reason
        self._hurry(0.0)

    def abandon(self) -> None:
        """Its client has gone: tell the model to stop, so that the row is free for others."""
        if self.abandoned:
            return
        self.abandoned = True
        self._hurry(GRACE_S)
        if self._call is not None and not self._over and not self._stopped:
            self._stopping = self._upstream.spawn(self._stop())

    def _hurry(self, seconds: float) -> None:
        if self._clock is not None:
            self._clock.reschedule(asyncio.get_running_loop().time() + seconds)

    async def _stop(self) -> None:
        self._stopped = True
        request = infer_request(self.model, self._id, {"text_input": "", "stop": True})
        # Where the stream has ended meanwhile, there is nothing left to stop.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._call.write(request)

    async def wind_up(self) -> None:
        """Let the stream end: by itself after the last response, by ``stop`` before it, by cancelling at last."""
        call = self._call
        if call is None or call.done():
            return
        try:
            async with asyncio.timeout(GRACE_S):
                if self._stopping is not None:
                    await self._stopping
                elif not self._over and not self._stopped:
                    await self._stop()
                await call.done_writing()
                while await call.read() is not grpc.aio.EOF:
                    pass
        except (TimeoutError, grpc.RpcError, asyncio.InvalidStateError):
            call.cancel()
