"""An engine that does nothing, for the ceiling of a generator in the engine's own process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from toolchain.runtime.types import Chunk, SamplingParams

NAME = "null"
TEXT = " token"


@dataclass(kw_only=True)
class Running:
    """One request; what ``LocalEngine.submit`` returns."""

    left: int
    due_s: float
    on_chunk: Callable[[Chunk], None]
    ended: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.ended.set()


class NullEngine:
    """``submit`` as LocalEngine has it; one thread gives every request a token in turn."""

    name = NAME

    def __init__(self) -> None:
        self._period_s = 0.0
        self._running: list[Running] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def pace(self, period_ms: float) -> None:
        """Milliseconds from token to token of one request, for those that come next; 0 as fast as it can."""
        self._period_s = period_ms / 1000

    def submit(
        self, prompt: str, params: SamplingParams, on_chunk: Callable[[Chunk], None], *, on_error: Any = None
    ) -> Running:
        found = Running(left=params.max_tokens or 1, due_s=time.perf_counter(), on_chunk=on_chunk)
        with self._changed:
            self._running.append(found)
            self._changed.notify()
        return found

    def _work(self) -> None:
        while not self._closed:
            with self._changed:
                self._running = [item for item in self._running if item.left and not item.ended.is_set()]
                now = time.perf_counter()
                next_s = min((item.due_s for item in self._running), default=now + 0.1)
                if next_s > now:
                    self._changed.wait(next_s - now)
                running, period_s = tuple(self._running), self._period_s
            for item in running:
                if time.perf_counter() >= item.due_s:
                    item.due_s += period_s
                    item.left -= 1
                    reason = None if item.left else "length"
                    item.on_chunk(Chunk(text=TEXT, token_ids=(0,), finish_reason=reason, prompt_tokens=1))

    def close(self) -> None:
        self._closed = True
        with self._changed:
            self._changed.notify()
        self._thread.join()
