"""The requests: fields, types and ranges of OpenAI's API, and the usual extensions of it.

Null means "not given", as in OpenAI's API. Defaults are OpenAI's (temperature 1, top_p 1; 16 tokens for completions,
the rest of the context for chat), not those of generation_config.json: a request means the same for every model.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_INT32 = 2**31 - 1
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64
"""OpenAI takes 4; the engine has no reason to be so strict."""

Count = Annotated[int, Field(ge=1, le=MAX_INT32)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]


_HALF = re.compile("[\ud800-\udfff]")


class Strict(BaseModel):
    """Unknown fields and wrong types are errors: a typo must not pass as a default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    """One more chunk before the end, with ``usage`` and without choices."""
    include_obfuscation: bool | None = None
    """Accepted and ignored: nothing is padded."""


class Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None


class Message(BaseModel):
    """One message. Fields that a client sends back from an answer (``annotations``...) are ignored."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    type: str


class Sampling(Strict):
    """What both kinds of requests have."""

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, document: Any) -> Any:
        """JSON can write half of a surrogate pair, which is no character and no tokenizer takes."""
        waiting = [document]
        while waiting:
            item = waiting.pop()
            if isinstance(item, dict):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                waiting += item
            elif isinstance(item, str) and not item.isascii() and _HALF.search(item):
                raise ValueError(
                    "a text holds half of a surrogate pair (\\ud800 to \\udfff alone): no Unicode"
                )
        return document

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    """0 is greedy. Default 1."""
    top_p: float | None = Field(None, gt=0, le=1)
    n: Count | None = None
    """Answers to each prompt. With ``seed`` the i-th has seed + i."""
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: Count | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    """Only empty: the engine has none."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    """Only ``text``: the engine does not constrain its answers."""

    top_k: int | None = Field(None, ge=-1, le=MAX_INT32)
    """Extension. 0 or -1: no limit."""
    min_p: float | None = None
    """Extension. Only 0: the engine has none."""
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    """Extension. 1: none."""
    ignore_eos: bool | None = None
    """Extension, for benchmarks: the answer goes on to max_tokens."""

    user: str | None = None
    """Accepted and ignored, as are ``metadata``, ``store`` and the next ones."""
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    """Given to the chat template; calls in the answer are not parsed, they stay text."""
    tool_choice: Any = None
    """``none`` or ``auto``."""
    parallel_tool_calls: bool | None = None
    """Accepted and ignored."""
    modalities: list[str] | None = None
    """Only ``["text"]``."""
    reasoning_effort: str | None = None
    """For chat templates that have a variable of that name."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Extension: variables of the chat template, such as ``enable_thinking``."""


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """How many tokens beside the chosen one; OpenAI takes at most 5."""
    echo: bool | None = None
    """The answer begins with the prompt."""
    best_of: int | None = None
    """Only 1."""
    suffix: str | None = None
    """Only empty: the engine does not fill in."""
