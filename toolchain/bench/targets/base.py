"""What every target does: take a request, give its answer in pieces with the time of their arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from toolchain.core.errors import ToolchainError

PROBE_PROMPT = "Say one word."
PROBE_TIMEOUT_S = 60.0
"""A cold server may compile or load on its first request."""


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """Everything that a target is made of. API keys are not in it: they come from the environment."""

    kind: str
    """One of settings.TARGETS."""
    url: str
    """host:port for gRPC, http://host:port otherwise, the engine's directory in the process."""
    model: str = ""
    """Its name on the server; empty: the only, or first, model of an OpenAI server."""
    endpoint: str = "completions"
    seed: int = 0
    ignore_eos: bool = True


@dataclass(frozen=True, kw_only=True)
class Request:
    prompt: str
    max_tokens: int


class Piece(NamedTuple):
    """One response. Most have one token; some bring no text."""

    received_s: float
    """time.perf_counter() when it arrived."""
    text: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    """Of the whole answer so far, where the server says so: the last one that is said counts."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a server says of itself."""

    name: str
    version: str
    model: str
    notes: tuple[str, ...] = ()
    """What it could not be asked for."""


class RequestError(Exception):
    """The server answered a request with an error. Its text is counted as it is, so it names no ids or times."""


class Target(Protocol):
    async def prepare(self) -> About:
        """Connect, find out what the server takes, and ask it once. ToolchainError TC-702 when it cannot be used."""

    def send(self, request: Request) -> AsyncIterator[Piece]:
        """The answer of one request; many may run at once. RequestError when the server refuses or fails.

        Leaving it early abandons the request.
        """

    async def close(self) -> None:
        """Let connections go."""


async def ask_once(target: Target, url: str) -> None:
    """One short request, so that nothing measured is the first. ToolchainError TC-702 when no answer comes in time."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            async for _ in target.send(Request(prompt=PROBE_PROMPT, max_tokens=1)):
                pass
    except TimeoutError as error:
        raise unusable(url, f"no answer within {PROBE_TIMEOUT_S:g} s") from error


def unusable(url: str, reason: str, hint: str = "") -> ToolchainError:
    """The error for a server that cannot be measured."""
    return ToolchainError(f"{url} cannot be measured: {reason}", hint=hint, code="TC-702")
