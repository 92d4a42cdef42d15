"""Requests and answers of the local engine: the contract between runtime, worker process and callers."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.core.errors import UsageError

MAX_SEED = 2**64 - 1
"""What torch generators and Triton's UINT64 input can both take."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The names and meanings of TensorRT-LLM's ``sampling_param_*`` inputs, where both have them."""

    max_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0: no limit."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings; none of it is returned."""
    ignore_eos: bool = False
    exclude_input_from_output: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.max_tokens < 1:
            problems.append(f"max_tokens {self.max_tokens} (expected >= 1)")
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(f"temperature {self.temperature} (expected >= 0)")
        if self.top_k < 0:
            problems.append(f"top_k {self.top_k} (expected >= 0)")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p {self.top_p} (expected 0 < top_p <= 1)")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            problems.append(f"seed {self.seed} (expected 0 to 2**64 - 1)")
        if any(not text for text in self.stop):
            problems.append("an empty stop string")
        if problems:
            raise UsageError("bad sampling parameters: " + ", ".join(problems), code="TC-501")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of one answer. The last one has ``finish_reason`` set (its text may be empty)."""

    text: str
    token_ids: tuple[int, ...] = ()
    """Generated tokens that this chunk accounts for."""
    finish_reason: str | None = None
    """``stop`` (end token or stop string), ``length``, ``cancelled``; None while it goes on."""
    prompt_tokens: int = 0
    """Length of the request's prompt in tokens."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
