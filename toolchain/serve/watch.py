"""One model under watch: is its stub there, and does its engine get on?"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from toolchain.core.errors import ToolchainError
from toolchain.serve.health import Health
from toolchain.triton.client import ModelError, RequestFailed
from toolchain.triton.probes import ModelLoad, probe_engine, probe_stub

STUB_TIMEOUT_S = 5.0
STUB_STRIKES = 2
"""A stub that parses a prompt of many megabytes may miss one probe."""
DEAD_STUB = "is not healthy"
"""What tritonserver says for a stub that died: ``Stub process 'tensorrt_llm_0_0' is not healthy.``"""

QUEUE_FULL = "TC-505"
GIVEN_UP = "reload the model"
"""What model.py of target local says when its engine process ended too often."""
ENGINE_WAIT_S = 0.2
"""An idle engine answers within it; a busy one is looked at again at the next interval."""


class Verdict(Enum):
    FINE = "fine"
    DEAD = "dead"
    """The stub: only unload and load bring it back."""
    HUNG = "hung"
    """The engine behind a stub that answers."""


class Server(Protocol):
    """What of a ``TritonServer`` is asked here."""

    @property
    def grpc_url(self) -> str: ...


@dataclass(kw_only=True)
class ModelWatch:
    """Asked every probe interval. ``hang_timeout_s``: how long nothing may be generated while a probe waits."""

    name: str
    server: Server
    health: Health
    hang_timeout_s: float
    pool: ThreadPoolExecutor
    _strikes: int = 0
    _progressed: float = field(default_factory=time.monotonic)
    _tokens: tuple[int, float] = (0, 0.0)
    _pending: Future[float] | None = None

    def check(self, load: ModelLoad | None) -> tuple[Verdict, str]:
        """The verdict and its reason. ``load``: from the server's metrics, None when they could not be had."""
        busy = load is not None and self._note_load(load)
        reason = self._ask_stub()
        if reason:
            return (Verdict.DEAD, reason) if self._strikes >= STUB_STRIKES else (Verdict.FINE, "")
        if busy and self._pending is None:
            # Something was generated since the last look: a token of our own would only wait in the queue.
            return Verdict.FINE, ""
        return self._ask_engine()

    def reset(self) -> None:
        """After a recovery: what was seen before says nothing any more."""
        self._strikes, self._pending, self._progressed = 0, None, time.monotonic()

    def _ask_stub(self) -> str:
        try:
            seconds = probe_stub(self.server.grpc_url, self.name, timeout_s=STUB_TIMEOUT_S)
        except RequestFailed as error:
            self._strikes += STUB_STRIKES if DEAD_STUB in error.message else 1
            self.health.update(self.name, up=False, reason=error.message)
            return error.message
        self._strikes = 0
        self.health.update(self.name, stub_seconds=seconds)
        return ""

    def _note_load(self, load: ModelLoad) -> bool:
        """Whether tokens were generated since the last look. Target trtllm counts none: there only probes tell."""
        now = time.monotonic()
        tokens, since = self._tokens
        rate = max(0, load.generated_tokens - tokens) / (now - since) if since else 0.0
        self._tokens = (load.generated_tokens, now)
        self.health.update(
            self.name,
            running=load.running,
            waiting=load.waiting,
            generated_tokens=load.generated_tokens,
            tokens_per_second=round(rate, 1),
        )
        if load.generated_tokens == tokens:
            return False
        self._progressed = now
        self._alive()
        return True

    def _ask_engine(self) -> tuple[Verdict, str]:
        """One generated token, asked for without waiting: a busy engine answers when its queue lets it."""
        if self._pending is None:
            self._pending = self.pool.submit(
                probe_engine, self.server.grpc_url, self.name, timeout_s=self.hang_timeout_s
            )
        try:
            seconds = self._pending.result(timeout=ENGINE_WAIT_S)
        except TimeoutError:
            return Verdict.FINE, ""
        except ToolchainError as error:
            self._pending = None
            return self._silent(error)
        self._pending = None
        self._progressed = time.monotonic()
        self.health.update(self.name, engine_seconds=seconds)
        self._alive()
        return Verdict.FINE, ""

    def _silent(self, error: ToolchainError) -> tuple[Verdict, str]:
        """No token came. Fine while others get theirs (a full queue), or for a while (the engine restarts)."""
        quiet_s = time.monotonic() - self._progressed
        told = isinstance(error, ModelError) and QUEUE_FULL not in error.message
        if told:
            self.health.update(self.name, up=False, reason=error.message)
        if quiet_s < self.hang_timeout_s and not (told and GIVEN_UP in error.message):
            return Verdict.FINE, ""
        return Verdict.HUNG, f"no token for {quiet_s:.0f} s: {error.message}"

    def _alive(self) -> None:
        self.health.update(self.name, up=True, reason="", last_probe=time.time())
