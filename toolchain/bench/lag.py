"""How late an event loop is: the time from an event to its handler, which is what an arrival time may be wrong by."""

from __future__ import annotations

import asyncio
import threading
import time
from types import TracebackType
from typing import Self

TICK_S = 0.005


class LagMeter:
    """A thread that makes an event every few milliseconds; a context manager within a running loop.

    A timer of the loop itself would not do: asyncio rounds its waits up to whole milliseconds, so it is late by up to
    one where an arriving byte is not.
    """

    def __init__(self) -> None:
        self.lag_s: list[float] = []
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _tick(self) -> None:
        due_s = time.perf_counter() + TICK_S
        while not self._stop.wait(max(0.0, due_s - time.perf_counter())):
            # From when it was due: a thread that had to wait for the interpreter shows a loop that is busy.
            self._loop.call_soon_threadsafe(self._seen, due_s)
            due_s += TICK_S

    def _seen(self, due_s: float) -> None:
        self.lag_s.append(time.perf_counter() - due_s)
