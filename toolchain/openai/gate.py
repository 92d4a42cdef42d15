"""What every request passes first: its id, the API key, whether the server still takes requests, a bounded body."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from toolchain.openai.failures import CLIENT_LEFT, ApiError, busy, unavailable
from toolchain.openai.keys import matches
from toolchain.openai.metrics import Metrics
from toolchain.openai.settings import Bounds

OPEN = ("/health", "/health/ready")
"""Without a key: load balancers and supervisors ask these."""
GENERATING = ("/v1/chat/completions", "/v1/completions")
ROUTES = (*OPEN, *GENERATING, "/v1/models", "/metrics", "/version", "/docs", "/openapi.json")
DISCARDED = 8
"""A body over the limit is read up to this many times the limit, so that its sender gets to see the answer."""

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Gate:
    """ASGI middleware around the whole application. ``draining`` and ``in_flight`` may be used from any thread."""

    def __init__(self, app: Any, *, api_keys: Sequence[str], bounds: Bounds, metrics: Metrics) -> None:
        self._app = app
        self._api_keys = tuple(api_keys)
        self._bounds = bounds
        self._metrics = metrics
        self.draining = False
        self.in_flight = 0
        """Requests for completions that have not ended."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        reply = _Reply(send)
        try:
            await self._checked(scope, path, receive, reply)
        finally:
            if reply.admitted:
                self.in_flight -= 1
                self._metrics.in_flight.dec()
            status = scope.get("toolchain.status", reply.status)
            self._metrics.requests.labels(_route(path), str(status)).inc()

    async def _checked(self, scope: Scope, path: str, receive: Receive, reply: _Reply) -> None:
        try:
            body = await self._admitted_body(scope, path, receive, reply)
        except ApiError as error:
            # Where the body was not read to its end, the next request cannot begin on this connection.
            await _refuse(error, reply, close=error.status in (408, 413) or not reply.body_read)
            return
        except ConnectionResetError:
            scope["toolchain.status"] = CLIENT_LEFT
            return
        await self._app(scope, _replayed(body, receive), reply)

    async def _admitted_body(self, scope: Scope, path: str, receive: Receive, reply: _Reply) -> bytes:
        """The body of a request that may pass; ApiError otherwise, once the body has gone by unkept."""
        posted = scope["method"] == "POST"
        try:
            self._admit(scope, path)
        except ApiError:
            if not posted:
                reply.body_read = True
            elif not _waits_for_leave(scope):
                await _read_body(scope, receive, self._bounds, keep=False)
                reply.body_read = True
            raise
        reply.body_read = True
        if path in GENERATING:
            reply.admitted = True
            self.in_flight += 1
            self._metrics.in_flight.inc()
        return await _read_body(scope, receive, self._bounds) if posted else b""

    def _admit(self, scope: Scope, path: str) -> None:
        headers = dict(scope["headers"])
        if self._api_keys and path not in OPEN:
            authorization = headers.get(b"authorization", b"").decode("latin-1")
            if not matches(authorization, self._api_keys):
                raise ApiError(
                    401,
                    "Incorrect API key provided"
                    if authorization
                    else "No API key: send Authorization: Bearer KEY",
                    code="invalid_api_key",
                )
        if path in GENERATING:
            if self.draining:
                raise unavailable("the server is shutting down and takes no new requests")
            if self.in_flight >= self._bounds.max_in_flight:
                raise busy(f"{self._bounds.max_in_flight} requests are being answered already")


class _Reply:
    """``send`` that adds the request's id and remembers the status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 500
        self.body_read = False
        self.admitted = False
        """Counted among those in flight."""
        self.headers = [(b"x-request-id", f"req_{uuid.uuid4().hex}".encode())]

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
        await self._send(message)


def _waits_for_leave(scope: Scope) -> bool:
    """Whether the client sends its body only once it is asked to (``Expect: 100-continue``, as curl)."""
    return any(name == b"expect" for name, _ in scope["headers"])


async def _read_body(scope: Scope, receive: Receive, bounds: Bounds, *, keep: bool = True) -> bytes:
    """The body, at most ``max_body_bytes`` of it; nothing of it without ``keep``. Raises ApiError 413, or 408 for one
    that does not arrive, ConnectionResetError when the client leaves."""
    limit = bounds.max_body_bytes
    headers = dict(scope["headers"])
    declared = headers.get(b"content-length", b"")
    announced = int(declared) if declared.isdigit() else 0
    if announced > limit and (_waits_for_leave(scope) or announced > DISCARDED * limit):
        raise _too_large(limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(bounds.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionResetError
                size += len(message.get("body", b""))
                if size <= limit and keep:
                    parts.append(message.get("body", b""))
                if size > DISCARDED * limit:
                    raise _too_large(limit)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {bounds.body_timeout_s:g} s") from None
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """``receive`` that gives ``body`` once, then what the connection says (that it was closed)."""
    given = False

    async def replay() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(error: ApiError, send: Send, *, close: bool) -> None:
    body = json.dumps(error.to_json(), ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _route(path: str) -> str:
    """The label of ``path``: a fixed set, whatever clients ask for."""
    if path in ROUTES:
        return path
    return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"
