"""What a benchmark is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from toolchain.bench.arrivals import parse_arrival
from toolchain.bench.lengths import parse_lengths
from toolchain.core.errors import UsageError

TARGETS = ("triton-grpc", "triton-http", "openai", "inprocess")
ENDPOINTS = ("completions", "chat")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One measurement for each of ``concurrency`` (closed loop), or for each of ``rate`` (open loop)."""

    target: str = "auto"
    """One of TARGETS, or auto: what the address turns out to be."""
    concurrency: tuple[int, ...] = (1, 4, 16)
    """Closed loop: so many users, each of which sends its next request when its last one has ended. Empty with
    ``rate``, and to replay the times of a ``trace``."""
    rate: tuple[float, ...] = ()
    """Open loop: requests per second, sent on time whether or not others have been answered."""
    arrival: str = "poisson"
    """Open loop: poisson, constant, or gamma:CV with that coefficient of variation of the gaps."""
    max_outstanding: int = 512
    """Open loop: most requests at once. One that is due beyond it waits, and its waiting counts."""
    requests: int = 32
    """Measured requests of each level in each repeat. Of a trace: its first so many, 0 all."""
    duration_s: float | None = None
    """Instead of ``requests``: those that start within so many seconds."""
    warmup: int | None = None
    """Requests before the measured ones. None: as many as there are users, at least 2."""
    repeats: int = 3
    """Of every level, one after the other: level 1, level 2 ..., level 1, level 2 ..."""
    prompt_tokens: int | str = 64
    """A number, normal:MEAN,STD, uniform:LOW,HIGH, lognormal:MEDIAN,SIGMA or exponential:MEAN."""
    output_tokens: int | str = 32
    """The same. Asked for with ignore_eos, so that every answer has the length that was asked for."""
    trace: str | None = None
    """File of requests to replay instead of ``prompt_tokens`` and ``output_tokens``; with times, instead of
    ``rate``."""
    trace_speed: float = 1.0
    """2: twice as fast as it was recorded."""
    seed: int = 0
    """Of prompts, lengths and arrivals."""
    timeout_s: float = 300.0
    """For one request. A server whose model process died never answers, so there is no unlimited wait."""
    ignore_eos: bool = True
    endpoint: str = "completions"
    """Of an OpenAI server: completions or chat."""
    ttft_slo_ms: float | None = None
    itl_slo_ms: float | None = None
    """Goodput counts requests that met both: the TTFT, and the mean time of a token after the first (TPOT)."""
    ceiling: bool = True
    """Measure what the generator itself can do, against a server that does nothing."""

    def __post_init__(self) -> None:
        problems = [*self._bad_load(), *self._bad_numbers()]
        for name in ("prompt_tokens", "output_tokens"):
            try:
                parse_lengths(getattr(self, name))
            except UsageError as error:
                problems.append(f"{name} {error.message}")
        if problems:
            raise UsageError("bad benchmark settings: " + ", ".join(problems), code="TC-701")

    @property
    def open_loop(self) -> bool:
        return bool(self.rate)

    def _bad_load(self) -> Iterator[str]:
        empty = not self.rate and not self.concurrency and self.trace is None
        if empty or any(level < 1 for level in self.concurrency):
            yield f"concurrency {list(self.concurrency)} (expected numbers >= 1)"
        if self.rate and self.concurrency:
            yield "both concurrency and rate (expected one of them; concurrency=() with a rate)"
        if any(not 0 < rate < float("inf") for rate in self.rate):
            yield f"rate {list(self.rate)} (expected numbers > 0)"
        for name in ("concurrency", "rate"):
            levels = getattr(self, name)
            if len(set(levels)) < len(levels):
                yield f"{name} {list(levels)} (expected each once; repeats measures again)"
        if self.target not in ("auto", *TARGETS):
            yield f"target {self.target!r} (expected auto, {', '.join(TARGETS)})"
        if self.endpoint not in ENDPOINTS:
            yield f"endpoint {self.endpoint!r} (expected {' or '.join(ENDPOINTS)})"
        try:
            parse_arrival(self.arrival)
        except UsageError as error:
            yield f"arrival {error.message}"

    def _bad_numbers(self) -> Iterator[str]:
        for name in ("repeats", "max_outstanding"):
            if getattr(self, name) < 1:
                yield f"{name} {getattr(self, name)} (expected >= 1)"
        least = 0 if self.trace else 1
        if self.requests < least:
            yield f"requests {self.requests} (expected >= {least})"
        if self.warmup is not None and self.warmup < 0:
            yield f"warmup {self.warmup} (expected >= 0)"
        if not 0 < self.timeout_s < float("inf"):
            yield f"timeout_s {self.timeout_s} (expected > 0)"
        if not 0 < self.trace_speed < float("inf"):
            yield f"trace_speed {self.trace_speed} (expected > 0)"
        for name in ("duration_s", "ttft_slo_ms", "itl_slo_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                yield f"{name} {value} (expected > 0)"
