"""Prometheus metrics of the endpoint, as clients see it; the model's own are Triton's."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class Metrics:
    """A registry of its own: several endpoints in one process do not meet."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        made: dict[str, Any] = {"namespace": "toolchain_openai", "registry": self._registry}
        self.requests = Counter(
            "requests",
            "HTTP requests by route and status; 499: the client left.",
            ["route", "status"],
            **made,
        )
        self.in_flight = Gauge("requests_in_flight", "Requests that wait or generate.", **made)
        self.choices = Counter(
            "choices", "Ended answers by finish reason.", ["model", "finish_reason"], **made
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", ["model"], **made)
        self.completion_tokens = Counter("completion_tokens", "Tokens of answers.", ["model"], **made)
        self.first = Histogram(
            "time_to_first_token_seconds", "Request to first piece; streamed requests.", ["model"],
            buckets=_SLOW, **made,
        )  # fmt: skip
        self.between = Histogram(
            "inter_token_seconds", "From piece to piece of one answer; streamed requests.", ["model"],
            buckets=_FAST, **made,
        )  # fmt: skip
        self.whole = Histogram(
            "request_seconds", "Request to end of the answer.", ["model"], buckets=_SLOW, **made
        )

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class Stopwatch:
    """The times of one request for completions."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._started = time.perf_counter()
        self._last: dict[int, float] = {}
        self._first = metrics.first.labels(model)
        self._between = metrics.between.labels(model)

    def piece(self, choice: int) -> None:
        """A piece of the answer ``choice`` came."""
        now = time.perf_counter()
        last = self._last.get(choice)
        if last is not None:
            self._between.observe(now - last)
        elif not self._last:
            self._first.observe(now - self._started)
        self._last[choice] = now

    def ended(self, finish_reason: str) -> None:
        self._metrics.choices.labels(self._model, finish_reason).inc()

    def usage(self, prompt_tokens: int, completion_tokens: int) -> None:
        """The whole request was answered."""
        self._metrics.prompt_tokens.labels(self._model).inc(prompt_tokens)
        self._metrics.completion_tokens.labels(self._model).inc(completion_tokens)
        self._metrics.whole.labels(self._model).observe(time.perf_counter() - self._started)
