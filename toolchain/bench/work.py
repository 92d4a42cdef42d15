"""The requests of each level and repeat: prompts, lengths and, in an open loop, when they are due."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.bench.arrivals import parse_arrival
from toolchain.bench.drive import Load
from toolchain.bench.lengths import parse_lengths
from toolchain.bench.prompts import TokenCounter, make_prompt
from toolchain.bench.settings import Settings
from toolchain.bench.targets.base import Request
from toolchain.bench.trace import Entry, read_trace

MIN_WARMUP_REQUESTS = 2
POOL = 256
"""Prompts of a level that lasts for a time: nobody knows how many it will need, so they come again."""
MOST_DUE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class LevelLoad:
    """One level: users of a closed loop, requests per second of an open one, or the times of a trace."""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def words(self) -> str:
        if self.concurrency is not None:
            return f"concurrency {self.concurrency}"
        return f"{self.rate:g} requests/s"


class Work:
    """Makes loads. The same settings make the same ones; no two levels or repeats share a prompt that was made."""

    def __init__(self, settings: Settings, counter: TokenCounter) -> None:
        """Raises UsageError TC-708 for a trace that cannot be read."""
        self._settings = settings
        self._counter = counter
        self._trace: tuple[Entry, ...] = ()
        if settings.trace is not None:
            self._trace = read_trace(Path(settings.trace), limit=settings.requests)
        self.replays = bool(
            self._trace and self._trace[0].at_s is not None and not settings.rate and not settings.concurrency
        )

        if self.replays and settings.duration_s is not None:
            end_s = settings.duration_s * settings.trace_speed
            self._trace = tuple(entry for entry in self._trace if (entry.at_s or 0.0) < end_s)

    @property
    def levels(self) -> tuple[LevelLoad, ...]:
        if self.replays:
            due_s = self._replayed_s()
            return (LevelLoad(rate=len(due_s) / due_s[-1] if due_s[-1] else float(len(due_s))),)
        if self._settings.open_loop:
            return tuple(LevelLoad(rate=rate) for rate in self._settings.rate)
        return tuple(LevelLoad(concurrency=users) for users in self._settings.concurrency or (1,))

    def load(self, level: LevelLoad, *, index: int, repeat: int) -> Load:
        """The load of level ``index`` in ``repeat``, both from 0."""
        settings = self._settings
        words = random.Random(f"{settings.seed} prompts {index} {repeat}")
        if self.replays:
            due_s = self._replayed_s()
            return self._made(self._shapes(len(due_s)), words, warmup=0, measured=len(due_s), due_s=due_s)
        warmup = settings.warmup
        if warmup is None:
            warmup = max(MIN_WARMUP_REQUESTS, level.concurrency or 0)
        measured = len(self._trace) if self._trace else settings.requests
        if level.rate is not None:
            due_s, measured = self._due(
                level.rate, warmup=warmup, measured=measured, index=index, repeat=repeat
            )
            return self._made(self._shapes(len(due_s)), words, warmup=warmup, measured=measured, due_s=due_s)
        users = level.concurrency or 1
        count = warmup + (measured if settings.duration_s is None else max(POOL, 2 * users)) + 2 * users
        return self._made(self._shapes(count, warmup), words, warmup=warmup, measured=measured, users=users)

    def warm_up(self) -> Load | None:
        """What goes before a trace, whose own requests are all measured; None for other loads: they have it in them."""
        count = MIN_WARMUP_REQUESTS if self._settings.warmup is None else self._settings.warmup
        if not self.replays or not count:
            return None
        shapes = self._shapes(count)
        return self._made(shapes, random.Random("warm-up"), warmup=count, measured=0, users=1)

    def _made(
        self,
        shapes: Sequence[Entry],
        words: random.Random,
        *,
        warmup: int,
        measured: int,
        due_s: Sequence[float] | None = None,
        users: int = 0,
    ) -> Load:
        settings = self._settings
        return Load(
            requests=[self._request(shape, words) for shape in shapes],
            warmup=warmup,
            measured=measured,
            concurrency=users,
            due_s=due_s,
            duration_s=settings.duration_s if due_s is None else None,
            max_outstanding=settings.max_outstanding,
            timeout_s=settings.timeout_s,
        )

    def _due(
        self, rate: float, *, warmup: int, measured: int, index: int, repeat: int
    ) -> tuple[list[float], int]:
        """Times of warm-up, measured requests and as many that keep the load up; and how many are measured."""
        settings = self._settings
        generator = random.Random(f"{settings.seed} arrivals {index} {repeat}")
        times = itertools.islice(parse_arrival(settings.arrival).times(rate, generator), MOST_DUE)
        due_s = list(itertools.islice(times, warmup + 1))
        if settings.duration_s is not None:
            end_s = due_s[-1] + settings.duration_s
            due_s += itertools.takewhile(lambda at: at < end_s, times)
            measured = len(due_s) - warmup
            # takewhile has taken the first one beyond the end; it only keeps the load up, at whatever time
            due_s.append(end_s)
        return due_s + list(itertools.islice(times, max(0, warmup + 2 * measured - len(due_s)))), measured

    def _shapes(self, count: int, offset: int = 0) -> list[Entry]:
        """Lengths of ``count`` requests: the same for every level and repeat, so that they compare.

        Of a trace its entries in their order, from the first measured request (at ``offset``) on; again from the
        beginning where it is too short.
        """
        if self._trace:
            size = len(self._trace)
            return [self._trace[(number - offset) % size] for number in range(count)]
        generator = random.Random(f"{self._settings.seed} lengths")
        prompt, output = (
            parse_lengths(text) for text in (self._settings.prompt_tokens, self._settings.output_tokens)
        )
        return [
            Entry(prompt_tokens=prompt.draw(generator), output_tokens=output.draw(generator))
            for _ in range(count)
        ]

    def _request(self, shape: Entry, words: random.Random) -> Request:
        output = shape.output_tokens
        if output is None:
            output = parse_lengths(self._settings.output_tokens).draw(words)
        prompt = shape.prompt
        if prompt is None:
            prompt = make_prompt(self._counter, words, shape.prompt_tokens or 1)
        return Request(prompt=prompt, max_tokens=output)

    def _replayed_s(self) -> list[float]:
        return [(entry.at_s or 0.0) / self._settings.trace_speed for entry in self._trace]
