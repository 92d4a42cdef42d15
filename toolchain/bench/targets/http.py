"""HTTP with streamed answers, for the two targets that speak it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from toolchain.bench.targets.base import RequestError, unusable
from toolchain.bench.targets.sse import EventParser

LONGEST_MESSAGE = 300
IDLE_S = 2.0
"""Connections that lay idle for longer are not used again: uvicorn closes them after 5 s, and between two loads nobody
here would see it."""


class Http:
    """One session with as many connections as there are requests at once. No proxies: they would be measured."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = dict(headers or {})
        self._session: Any = None

    def session(self) -> Any:
        """The aiohttp session; made in the running event loop at first use."""
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
                timeout=aiohttp.ClientTimeout(total=None),
                headers=self._headers,
            )
        return self._session

    async def get_json(self, path: str, *, timeout_s: float) -> Any:
        """The document at ``path``. ToolchainError TC-702 when there is none."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self.session().get(self.url + path, timeout=timeout) as response:
                body = await response.read()
                if response.status != 200:
                    raise unusable(self.url, f"{path} is answered with {refusal(response.status, body)}")
                return json.loads(body)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            reason = f"{path}: {type(error).__name__} {error}".rstrip()
            raise unusable(self.url, reason, "is the server running, and is this its HTTP port?") from error

    async def events(self, path: str, body: bytes) -> AsyncIterator[tuple[float, bytes]]:
        """(time.perf_counter(), data) of each event. RequestError for another status than 200."""
        parser = EventParser()
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        async with self.session().post(self.url + path, data=body, headers=headers) as response:
            if response.status != 200:
                raise RequestError(refusal(response.status, await response.read()))
            async for chunk in response.content.iter_any():
                received_s = time.perf_counter()
                for data in parser.feed(chunk):
                    yield received_s, data
            received_s = time.perf_counter()
            for data in parser.end():
                yield received_s, data

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


def refusal(status: int, body: bytes) -> str:
    """Status and message of an error answer, which is JSON of one shape or another, or text."""
    try:
        message = error_message(json.loads(body))
    except ValueError:
        message = body.decode("utf-8", errors="replace")
    return f"HTTP {status}: {' '.join(message.split())[:LONGEST_MESSAGE]}"


def error_message(value: Any) -> str:
    """The message of ``{"error": "..."}``, ``{"error": {"message": "..."}}`` or ``{"message": "..."}``."""
    found = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail") or found
    return found if isinstance(found, str) else json.dumps(found)
