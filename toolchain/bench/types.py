"""What a benchmark measures, and the JSON document that it leaves. Definitions of the figures: README.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from toolchain.bench.settings import Settings

SCHEMA_VERSION = 2

__all__ = [
    "SCHEMA_VERSION",
    "BenchResult",
    "Distribution",
    "Generator",
    "Goodput",
    "GpuUse",
    "Interval",
    "Level",
    "Repeat",
    "Settings",
    "Summary",
]


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """None: not known (results of schema version 1, and of other programs)."""

    p50: float
    p90: float
    p99: float
    mean: float
    count: int
    p95: float | None = None
    std: float | None = None
    """Of the sample: divided by count - 1; 0 of a single value."""
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Of the mean of one figure over the repeats: Student's t with ``repeats`` - 1 degrees of freedom."""

    mean: float
    low: float
    high: float
    repeats: int
    confidence: float = 0.95
    method: str = "t"


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Requests that met the objectives. A failed one met none; one without a second token has no ITL to miss."""

    ttft_slo_ms: float | None
    itl_slo_ms: float | None
    """Of the mean time of a token after the first of one request (its TPOT)."""
    requests: int
    share: float
    """Of all measured requests, 0 to 1."""
    requests_per_s: float


@dataclass(frozen=True, kw_only=True)
class Generator:
    """What the load generator itself can do, and whether it stood in the way."""

    ceiling_tokens_per_s: float | None
    """Its own rate with the same load against a server that does nothing; None: not measured."""
    ceiling_by: str
    """What the ceiling was limited by: generator, or null server (then the generator can do more)."""
    added_ttft_ms: float | None
    """Mean TTFT against the server that does nothing: what client and protocol are of every TTFT."""
    jitter_p99_ms: float | None
    """How much later than at its pace a response of that server is seen, 99th percentile."""
    cpu_share: float | None
    """CPU of the generator's process over the time of the load, in cores; None: it shares its process."""
    lag_p99_ms: float
    """Lateness of the generator's event loop: closed and open loop."""
    send_lag_p99_ms: float | None
    """Open loop: from when a request was due to when it was sent."""
    limited: bool
    why: tuple[str, ...]
    """Each reason in words; empty unless ``limited``."""


@dataclass(frozen=True, kw_only=True)
class GpuUse:
    """By NVML at 10 Hz, over all visible GPUs, or over those that the engine has."""

    devices: tuple[str, ...]
    memory_peak_gib: float
    """Sum over the devices, of everything that runs there."""
    power_mean_w: float | None
    """Sum over the devices; None where a device does not tell."""
    energy_per_token_j: float | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of a number of requests. Distributions are None when nothing succeeded."""

    requests: int
    """Measured ones, failed ones included."""
    errors: int
    error_messages: dict[str, int]
    """Message -> how often. No failed request is left out of ``requests``."""
    duration_s: float
    """Of the window in which they were measured."""
    ttft_ms: Distribution | None
    """Time to first token: to the first response with text. From the sending; open loop: from when it was due."""
    itl_ms: Distribution | None
    """Gaps between successive responses with text, over all requests."""
    tpot_ms: Distribution | None
    """Time per output token after the first, one figure for each request. This is aiperf's inter_token_latency."""
    e2e_ms: Distribution | None
    """To the last response."""
    prompt_tokens: int
    output_tokens: int
    """Of all successful requests."""
    output_tokens_per_s: float
    """Tokens that arrived within the window, over its length."""
    requests_per_s: float
    """Successful ones of the window, over its length. Closed loop: each with the share of its time that lies in it."""
    user_tokens_per_s: Distribution | None = None
    """1 / TPOT of each request: how fast its user sees tokens."""
    output_tokens_per_s_per_gpu: float | None = None
    """None: no GPUs, or their number is not known."""
    goodput: Goodput | None = None
    """None: no objectives were given."""
    outstanding_peak: int = 0
    """Most requests at once."""
    held_back: int = 0
    """Open loop: requests that were due while ``max_outstanding`` others ran."""


@dataclass(frozen=True, kw_only=True)
class Repeat(Summary):
    """One repeat of a level."""

    started: str = ""
    """UTC, ISO 8601."""
    gpu: GpuUse | None = None


@dataclass(frozen=True, kw_only=True)
class Level(Summary):
    """One load: the requests of all its repeats together (rates: over the sum of their windows)."""

    concurrency: int | None
    """Users of a closed loop."""
    rate: float | None = None
    """Requests per second of an open loop; of a trace the mean."""
    warmup_errors: int = 0
    repeats: tuple[Repeat, ...] = ()
    intervals: dict[str, Interval] = field(default_factory=dict)
    """Figure ("ttft_ms.p50", "itl_ms.mean", "output_tokens_per_s" ...) -> its mean over the repeats; empty with
    fewer than two."""
    generator: Generator | None = None
    gpu: GpuUse | None = None


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    created: str
    """UTC, ISO 8601."""
    url: str
    model: str
    settings: Settings
    environment: dict[str, Any]
    """Versions, CPU, GPUs, ``server`` {name, version}, ``engine`` {name, manifest_sha256, ...} or None."""
    levels: tuple[Level, ...]
    target: str = "triton-grpc"
    """What was measured: one of settings.TARGETS, or the name of another program."""
    tool: str = "toolchain"
    """What measured it: toolchain, aiperf or trtllm-bench."""
    gpus: int | None = None
    """Number of GPUs that ``output_tokens_per_s_per_gpu`` divides by."""
    partial: bool = False
    """It was interrupted: levels or repeats are missing."""
    token_counting: str = "engine tokenizer on the returned text, at most output_tokens each"
    load: str = "closed loop, gRPC streaming"
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def errors(self) -> int:
        return sum(level.errors for level in self.levels)

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        return {"schema_version": value.pop("schema_version"), **value}
