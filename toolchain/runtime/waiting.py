"""The queue before the batch: how much may wait, and for how long."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.runtime.request import Request


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """What a server refuses instead of letting it wait. Raises UsageError (TC-509) for impossible limits."""

    max_waiting: int = 1024
    """Requests that wait for a free row."""
    max_waiting_tokens: int | None = None
    """Prompt tokens of all waiting requests together; one request alone may always wait. None: no limit."""
    max_queue_s: float | None = None
    """Longest wait of one request, in seconds. None: no limit."""

    def __post_init__(self) -> None:
        for name, least in (("max_waiting", 0), ("max_waiting_tokens", 0), ("max_queue_s", 0.0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UsageError(f"{name} {value} (expected >= {least})", code="TC-509")


class WaitingQueue:
    """Requests in the order in which they came. Its owner guards it with a lock."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self.tokens = 0
        """Prompt tokens of the requests in it."""
        self.blocked = False
        """Whether the oldest request did not fit when it was last asked for: free rows are then of no use."""
        self._requests: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request, *, free: int) -> None:
        """Append ``request``. ToolchainError TC-505 when the queue is full.

        ``free``: requests that the next turn takes out anyway, because the batch has room for them.
        """
        count, limits = len(self._requests), self.limits
        if count >= limits.max_waiting + free:
            raise ToolchainError(
                f"{count} requests are waiting already, the most that this engine queues ({limits.max_waiting})",
                hint="send again later, or send fewer requests at a time",
                code="TC-505",
            )
        length, most = len(request.prompt_ids), limits.max_waiting_tokens
        if most is not None and count >= max(1, free) and self.tokens + length > most:
            raise ToolchainError(
                f"{count} requests with {self.tokens} prompt tokens are waiting already, and this one has {length}: "
                f"the engine queues at most {most} tokens",
                hint="send again later, or send fewer requests at a time",
                code="TC-505",
            )
        self._requests.append(request)
        self.tokens += length

    def take(self, count: int, fits: Callable[[Request], bool] | None = None) -> list[Request]:
        """Remove up to ``count`` requests, oldest first, up to one that does not fit (``blocked`` from then on)."""
        taken: list[Request] = []
        self.blocked = False
        while self._requests and len(taken) < count and not self.blocked:
            if fits is None or fits(self._requests[0]):
                taken.append(self._requests.popleft())
            else:
                self.blocked = True
        self.tokens -= sum(len(request.prompt_ids) for request in taken)
        return taken

    def cancelled(self) -> list[Request]:
        """Remove and return the requests that their senders have given up."""
        return self._remove([request for request in self._requests if request.cancelled.is_set()])

    def overdue(self) -> list[tuple[Request, ToolchainError]]:
        """Remove and return the requests that have waited too long, with the error that says so."""
        now, limit = time.monotonic(), self.limits.max_queue_s
        found = []
        for request in self._requests:
            waited = now - request.arrived_s
            if limit is not None and waited > limit:
                found.append((request, _too_long(waited, limit)))
            elif request.overdue:
                found.append((request, timed_out(request)))
        self._remove([request for request, _ in found])
        return found

    def _remove(self, gone: list[Request]) -> list[Request]:
        if gone:
            identities = {id(request) for request in gone}
            self._requests = deque(item for item in self._requests if id(item) not in identities)
            self.tokens -= sum(len(request.prompt_ids) for request in gone)
        return gone


def timed_out(request: Request) -> ToolchainError:
    """The error of a request whose sender's own timeout has passed."""
    return ToolchainError(
        f"the request did not end within its timeout of {request.timeout_s:g} s "
        f"({len(request.generated)} tokens were generated)",
        hint="ask for fewer tokens, or give it a longer timeout",
        code="TC-513",
    )


def _too_long(waited: float, limit: float) -> ToolchainError:
    return ToolchainError(
        f"the request waited {waited:.1f} s for a free row, this engine lets it wait {limit:g} s",
        hint="send again later, or send fewer requests at a time",
        code="TC-512",
    )
