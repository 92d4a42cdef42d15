"""Requests and answers of the local engine: the contract between runtime, worker process and callers."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.core.errors import UsageError

MAX_SEED = 2**64 - 1
"""What torch generators and Triton's UINT64 input can both take."""
DEFAULT_MAX_TOKENS = 64
"""Length of an answer whose sender names none, where the prompt leaves that much room."""
MAX_LOGPROBS = 20
"""Most alternatives per token, as in OpenAI's ``top_logprobs``: they travel with every token."""
MAX_STOPS = 64
"""Most stop strings of one request: the text is compared with all of them after every token."""
MAX_STOP_LENGTH = 4096
"""Characters of one stop string."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The names and meanings of TensorRT-LLM's ``sampling_param_*`` inputs, where both have them."""

    max_tokens: int | None = None
    """None: ``DEFAULT_MAX_TOKENS``, or what the prompt leaves of max_seq_len if that is less."""
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
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the answer holds it (OpenAI: -2 to 2)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token that the answer holds (OpenAI: -2 to 2)."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of the tokens of prompt and answer (transformers)."""
    logprobs: int | None = None
    """Log probabilities of the chosen token and of this many best ones, 0 to 20; None: none at all."""
    add_special_tokens: bool = True
    """Whether a prompt given as text gets the tokenizer's own special tokens (BOS)."""

    def __post_init__(self) -> None:
        problems = []
        if self.max_tokens is not None and self.max_tokens < 1:
            problems.append(f"max_tokens {self.max_tokens} (expected >= 1)")
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(f"temperature {self.temperature} (expected >= 0)")
        if self.top_k < 0:
            problems.append(f"top_k {self.top_k} (expected >= 0)")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p {self.top_p} (expected 0 < top_p <= 1)")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            problems.append(f"seed {self.seed} (expected 0 to 2**64 - 1)")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                problems.append(f"{name} {getattr(self, name)} (expected -2 to 2)")
        if not 0.0 < self.repetition_penalty < float("inf"):
            problems.append(f"repetition_penalty {self.repetition_penalty} (expected > 0)")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            problems.append(f"logprobs {self.logprobs} (expected 0 to {MAX_LOGPROBS})")
        if any(not text for text in self.stop):
            problems.append("an empty stop string")
        if len(self.stop) > MAX_STOPS:
            problems.append(f"{len(self.stop)} stop strings (expected at most {MAX_STOPS})")
        longest = max(map(len, self.stop), default=0)
        if longest > MAX_STOP_LENGTH:
            problems.append(f"a stop string of {longest} characters (expected at most {MAX_STOP_LENGTH})")
        if problems:
            raise UsageError("bad sampling parameters: " + ", ".join(problems), code="TC-501")


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """How likely the model found one generated token: natural logarithms of its raw distribution, before penalties,
    temperature and top_k/top_p."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability) of the best tokens, best first: ``SamplingParams.logprobs`` of them."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Moments of one request, ``time.time_ns()`` of the process that ran the model. 0: never came to it."""

    arrival_ns: int
    first_scheduled_ns: int = 0
    """When it left the queue."""
    first_token_ns: int = 0
    last_token_ns: int = 0


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
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of ``token_ids`` when the request asked for them."""
    stop_reason: str | int | None = None
    """The stop string or the id of the end token that ended the answer; last chunk only."""
    cumulative_logprob: float | None = None
    """Sum over all generated tokens, when log probabilities were asked for; last chunk only."""
    times: Times | None = None
    """Last chunk only."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    cumulative_logprob: float | None = None
