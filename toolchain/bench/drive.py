"""The load itself: requests sent to a target, closed or open loop, in one event loop.

Nothing else happens here while it runs: prompts were made before, tokens are counted after.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolchain.bench.lag import LagMeter
from toolchain.bench.targets.base import Request, RequestError, Target

AFTER_FAILURE_S = 0.1
"""A user whose request failed waits before the next one: a server that refuses everything is not hammered."""
SPIN_S = 0.0015
"""Timers of the event loop are up to a millisecond late; the rest is waited for by looking at the clock."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent. The first ``warmup`` requests are not measured, the next ``measured`` are; what comes after them
    keeps the load up until the last measured one is answered, and is not measured either."""

    requests: Sequence[Request]
    """In the order of their sending; a closed loop begins again when it has sent them all."""
    warmup: int
    measured: int
    concurrency: int = 0
    """Users of a closed loop."""
    due_s: Sequence[float] | None = None
    """Open loop: when each of ``requests`` is due, from the start."""
    duration_s: float | None = None
    """Closed loop: measured are all that start within this time instead of ``measured``."""
    max_outstanding: int = 512
    timeout_s: float = 300.0


@dataclass(kw_only=True)
class Answer:
    """One request and what came of it; times of time.perf_counter()."""

    index: int
    """Into ``Load.requests``."""
    measured: bool
    due_s: float | None
    sent_s: float
    finished_s: float = 0.0
    piece_s: list[float]
    text: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Driven:
    answers: list[Answer]
    started_s: float
    cpu_share: float
    """CPU seconds of this process over the seconds of the load."""
    lag_s: list[float]
    """How late the event loop was, every few milliseconds."""
    outstanding_peak: int
    held_back: int


class Driver:
    """One load on one target."""

    def __init__(self, target: Target, load: Load, on_ended: Callable[[Answer], None]) -> None:
        self._target = target
        self._load = load
        self._on_ended = on_ended
        self._answers: list[Answer] = []
        self._next = 0
        self._pending = 0
        """Measured requests that run, or are about to."""
        self._measuring_since: float | None = None
        self._outstanding = self._peak = self._held_back = 0

    async def run(self) -> Driven:
        started_s, cpu = time.perf_counter(), _cpu_s()
        with LagMeter() as meter:
            if self._load.due_s is None:
                await asyncio.gather(*(self._user() for _ in range(self._load.concurrency)))
            else:
                await self._send_when_due(self._load.due_s, started_s)
        seconds = time.perf_counter() - started_s
        return Driven(
            answers=self._answers,
            started_s=started_s,
            cpu_share=(_cpu_s() - cpu) / seconds if seconds else 0.0,
            lag_s=meter.lag_s,
            outstanding_peak=self._peak,
            held_back=self._held_back,
        )

    async def _user(self) -> None:
        while (taken := self._take()) is not None:
            index, measured, filler = taken
            answer = await self._ask(index, measured=measured, due_s=None)
            if answer.error is not None:
                if filler:
                    return
                await asyncio.sleep(AFTER_FAILURE_S)

    def _take(self) -> tuple[int, bool, bool] | None:
        """(index, whether it is measured, whether it only keeps up the load) of the next request of a closed loop."""
        load, now = self._load, time.perf_counter()
        number = self._next
        if number >= load.warmup and self._measuring_since is None:
            self._measuring_since = now
        measured = self._measuring_since is not None and (
            number < load.warmup + load.measured
            if load.duration_s is None
            else now < self._measuring_since + load.duration_s
        )
        filler = self._measuring_since is not None and not measured
        if filler and not self._pending:
            return None
        self._next += 1
        self._pending += measured
        return number % len(load.requests), measured, filler

    async def _send_when_due(self, due_s: Sequence[float], started_s: float) -> None:
        load, running, released_s = self._load, set[asyncio.Task[Answer]](), 0.0
        for index, offset in enumerate(due_s):
            await _sleep_until(started_s + offset)
            measured = load.warmup <= index < load.warmup + load.measured
            if index >= load.warmup + load.measured and not self._pending:
                break
            if len(running) >= load.max_outstanding:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                released_s = time.perf_counter()
            self._held_back += started_s + offset < released_s
            self._pending += measured
            task = asyncio.create_task(self._ask(index, measured=measured, due_s=started_s + offset))
            running.add(task)
            task.add_done_callback(running.discard)
        if running:
            await asyncio.wait(running)

    async def _ask(self, index: int, *, measured: bool, due_s: float | None) -> Answer:
        """Send one request and follow its answer to the end, whatever goes wrong."""
        self._outstanding += 1
        self._peak = max(self._peak, self._outstanding)
        answer = Answer(index=index, measured=measured, due_s=due_s, sent_s=time.perf_counter(), piece_s=[])
        try:
            await self._follow(answer)
        finally:
            self._outstanding -= 1
            self._pending -= measured
        self._answers.append(answer)
        self._on_ended(answer)
        return answer

    async def _follow(self, answer: Answer) -> None:
        texts: list[str] = []
        times = answer.piece_s
        last_s = None
        try:
            async with asyncio.timeout(self._load.timeout_s):
                async for piece in self._target.send(self._load.requests[answer.index]):
                    last_s = piece.received_s
                    if piece.text:
                        times.append(last_s)
                        texts.append(piece.text)
                    if piece.output_tokens is not None:
                        answer.output_tokens = piece.output_tokens
                    if piece.prompt_tokens is not None:
                        answer.prompt_tokens = piece.prompt_tokens
        except RequestError as error:
            answer.error = str(error)
        except TimeoutError:
            answer.error = f"did not finish its answer within {self._load.timeout_s:g} s"
        except Exception as error:  # noqa: BLE001 - one failed request must not end the others
            answer.error = f"{type(error).__name__}: {error}"
        answer.text = "".join(texts)
        answer.finished_s = last_s if last_s is not None and answer.error is None else time.perf_counter()
        if answer.error is None and last_s is None:
            answer.error = "the answer was empty: not one response came"


async def _sleep_until(at_s: float) -> None:
    while (left := at_s - time.perf_counter()) > 0:
        await asyncio.sleep(left - SPIN_S if left > SPIN_S else 0)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
