"""Continuous batching: one thread runs the model, requests join and leave between two steps."""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.runtime.batch import Batch
from toolchain.runtime.model import Runner
from toolchain.runtime.prefill import Prefill, group
from toolchain.runtime.request import Request
from toolchain.runtime.waiting import QueueLimits, WaitingQueue, timed_out


@dataclass(frozen=True, kw_only=True)
class Load:
    """What an engine has to do."""

    running: int
    """Requests that have a row, or whose prompt is being read."""
    waiting: int
    tokens: int
    """Prompt tokens of those that wait."""


class Scheduler:
    """Owns the model thread. Public methods may be called from any thread."""

    def __init__(self, runner: Runner, *, max_batch_size: int, queue: QueueLimits) -> None:
        self.flush: Callable[[], None] = _nothing
        """Called on the model thread when some requests may have had chunks: after prompts, and after steps."""
        self._runner = runner
        self._max_batch_size = max_batch_size
        self._waiting = WaitingQueue(queue)
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._prefills: deque[Prefill] = deque()
        self._batches: list[Batch] = []
        """One batch for all requests; one per request for models whose caches cannot be merged."""
        self._active: tuple[Request, ...] = ()
        """Requests that run, for other threads, which must not walk through the lists of this one: always replaced."""
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)
        self._thread.start()

    def add(self, request: Request) -> None:
        """Queue a request. Raises ToolchainError when the queue is full or the engine is closed."""
        with self._change:
            self._refuse_closed()
            free = 0 if self._waiting.blocked else self._max_batch_size - self._occupied()
            self._waiting.add(request, free=free)
            self._change.notify()

    def load(self) -> Load:
        """How much runs and waits at this moment."""
        with self._change:
            return Load(running=self._occupied(), waiting=len(self._waiting), tokens=self._waiting.tokens)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` on the model thread between two steps and return its result."""
        future: Future[Any] = Future()
        with self._change:
            self._refuse_closed()
            self._calls.append((function, future))
            self._change.notify()
        return future.result()

    def wake(self) -> None:
        with self._change:
            self._change.notify()

    def close(self) -> None:
        """Fail what is unfinished and end the thread."""
        with self._change:
            self._closing = True
            self._change.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _refuse_closed(self) -> None:
        if self._closing:
            raise _closed()

    def _loop(self) -> None:
        import torch

        self._runner.bind()
        with torch.inference_mode():
            while self._wait():
                try:
                    self._turn()
                except Exception as error:  # noqa: BLE001 - the thread must outlive any failure of a turn
                    self._fail_running(error)
                self.flush()
        self._drain()
        self.flush()

    def _wait(self) -> bool:
        """Sleep until there is work; False when the engine closes."""
        with self._change:
            self._change.wait_for(lambda: self._closing or self._waiting or self._calls or self._running())
            return not self._closing

    def _occupied(self) -> int:
        """Rows that are taken. One whose answer has just ended is free, though it is still to be cleared."""
        return sum(not request.ended.is_set() for request in self._active)

    def _running(self) -> list[Request]:
        """Requests that have a row, or will have one when their prompt is read."""
        prompts = [request for prefill in self._prefills for request in prefill.requests]
        return prompts + [request for batch in self._batches for request in batch.requests]

    def _turn(self) -> None:
        self._run_calls()
        self._cancel()
        self._admit()
        if self._prefills:
            self._prefill()
            # The first tokens do not wait for the step of the others.
            self.flush()
        for batch in self._batches:
            self._step(batch)
        self._sweep()

    def _run_calls(self) -> None:
        with self._change:
            calls, self._calls = self._calls, deque()
        for function, future in calls:
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - handed to the caller by the future
                future.set_exception(error)

    def _cancel(self) -> None:
        """End what its sender gave up, and what took too long."""
        with self._change:
            gone, late = self._waiting.cancelled(), self._waiting.overdue()
        running = self._running()
        for request in gone + [request for request in running if request.cancelled.is_set()]:
            request.finish("cancelled")
        late += [(request, timed_out(request)) for request in running if request.overdue]
        for request, error in late:
            request.fail(error)
        self._sweep()

    def _sweep(self) -> None:
        """Forget requests that have ended."""
        for batch in self._batches:
            batch.shrink()
        for prefill in self._prefills:
            prefill.requests = [request for request in prefill.requests if not request.ended.is_set()]
        self._batches = [batch for batch in self._batches if batch.requests]
        self._prefills = deque(prefill for prefill in self._prefills if prefill.requests)
        self._active = tuple(self._running())
        self._runner.keep_only(self._active)

    def _admit(self) -> None:
        """Take waiting requests into the free rows, oldest first."""
        free = self._max_batch_size - len(self._running())
        with self._change:
            taken = self._waiting.take(free, self._runner.reserve)
            self._active += tuple(taken)
        for request in taken:
            request.schedule()
        self._prefills.extend(group(self._runner, taken))

    def _prefill(self) -> None:
        """Read about ``prefill_tokens`` positions of prompts; the rest waits until the answers had a step."""
        spent, budget = 0, self._runner.prefill_tokens
        while self._prefills and (spent == 0 or spent + self._prefills[0].positions <= budget):
            prefill = self._prefills.popleft()
            spent += prefill.positions
            try:
                batch = prefill.advance()
            except Exception as error:  # noqa: BLE001 - reported to the requests it concerns
                self._retry_apart(prefill, error)
                continue
            if batch is None:
                self._prefills.appendleft(prefill)
            else:
                self._join(batch)

    def _retry_apart(self, prefill: Prefill, error: Exception) -> None:
        """One of the prompts may be what the model cannot take: the others must not pay for it."""
        again = [
            request for request in prefill.requests if not request.ended.is_set() and not request.generated
        ]
        for request in prefill.requests:
            if len(prefill.requests) == 1 or request not in again:
                request.fail(_failed("reading the prompt", error))
        if len(prefill.requests) > 1:
            self._prefills.extendleft(Prefill(self._runner, [request]) for request in reversed(again))

    def _join(self, batch: Batch) -> None:
        batch.shrink()
        if not batch.requests:
            return
        if self._batches and self._runner.mergeable:
            self._batches[0].absorb(batch)
        else:
            self._batches.append(batch)

    def _step(self, batch: Batch) -> None:
        try:
            batch.step()
        except Exception as error:  # noqa: BLE001 - reported to the requests it concerns
            for request in batch.requests:
                request.fail(_failed("generating", error))

    def _fail_running(self, error: Exception) -> None:
        for request in self._running():
            request.fail(_failed("scheduling", error))
        self._prefills, self._batches, self._active = deque(), [], ()

    def _drain(self) -> None:
        with self._change:
            waiting = self._waiting.take(len(self._waiting))
            calls, self._calls = list(self._calls), deque()
        for request in waiting + self._running():
            request.fail(_closed())
        self._prefills, self._batches = deque(), []
        for _, future in calls:
            future.set_exception(_closed())


def _nothing() -> None:
    return None


def _failed(doing: str, error: Exception) -> ToolchainError:
    if isinstance(error, ToolchainError):
        return error
    # The frames of the traceback hold activations and caches, which must not outlive an out-of-memory error.
    traceback.clear_frames(error.__traceback__)
    failure = ToolchainError(
        f"the model failed while {doing}: {type(error).__name__}: {error}", code="TC-504"
    )
    failure.__cause__ = error
    return failure


def _closed() -> ToolchainError:
    return ToolchainError("the engine is closed", code="TC-506")
