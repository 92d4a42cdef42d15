"""What a benchmark is asked, what it measures, and the JSON document that it leaves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from toolchain.core.errors import UsageError

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A closed loop: each of ``concurrency`` clients sends its next request when its last one has ended."""

    concurrency: tuple[int, ...] = (1, 4, 16)
    """One measurement for each."""
    requests: int = 32
    """Measured requests for each concurrency."""
    prompt_tokens: int = 64
    output_tokens: int = 32
    """Asked for with ignore_eos, so that every answer has the same length."""
    seed: int = 0
    """Of the prompts, which all differ."""
    timeout_s: float = 300.0
    """For one request. A server whose model process died never answers, so there is no unlimited wait."""
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        problems = []
        if not self.concurrency or any(level < 1 for level in self.concurrency):
            problems.append(f"concurrency {list(self.concurrency)} (expected numbers >= 1)")
        for name in ("requests", "prompt_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                problems.append(f"{name} {getattr(self, name)} (expected >= 1)")
        if not self.timeout_s > 0:
            problems.append(f"timeout_s {self.timeout_s} (expected > 0)")
        if problems:
            raise UsageError("bad benchmark settings: " + ", ".join(problems), code="TC-701")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One request. Times in seconds of time.perf_counter()."""

    started_s: float
    finished_s: float
    piece_s: tuple[float, ...] = ()
    """Arrival of each response that brought text."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Distribution:
    p50: float
    p90: float
    p99: float
    mean: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Level:
    """The measurement at one concurrency. Distributions are None when nothing succeeded."""

    concurrency: int
    requests: int
    errors: int
    error_messages: dict[str, int]
    """Message -> how often. No failed request is left out of ``requests``."""
    warmup_errors: int
    duration_s: float
    ttft_ms: Distribution | None
    """Time to first token: from sending the request to the first response with text."""
    itl_ms: Distribution | None
    """Inter-token latency: gaps between successive responses with text, over all requests."""
    tpot_ms: Distribution | None
    """Time per output token after the first, one figure for each request."""
    e2e_ms: Distribution | None
    """From sending the request to its last response."""
    prompt_tokens: int
    output_tokens: int
    """Tokens of the returned texts as the engine's tokenizer counts them, over all successful requests."""
    output_tokens_per_s: float
    requests_per_s: float
    """Successful ones."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    created: str
    """UTC, ISO 8601."""
    url: str
    model: str
    settings: Settings
    environment: dict[str, Any]
    levels: tuple[Level, ...]
    token_counting: str = "engine tokenizer on the returned text, at most output_tokens each"
    load: str = "closed loop, gRPC streaming"
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def errors(self) -> int:
        return sum(level.errors for level in self.levels)

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        return {"schema_version": value.pop("schema_version"), **value}
