"""The JSON of answers: whole, and in chunks as OpenAI streams them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from toolchain.openai.logprobs import CompletionLogprobs, chat_logprobs


@dataclass(frozen=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def to_json(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass(kw_only=True)
class Choice:
    """One answer, as it grows."""

    texts: list[str] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    """Log probabilities, as the contract of the model describes them."""
    finish_reason: str = ""
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Shape(Protocol):
    """How one kind of answer looks."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]: ...

    def opening(self, index: int) -> str:
        """The event before the first text of an answer; empty where there is none."""
        ...

    def chunk(
        self, index: int, text: str, tokens: Sequence[dict[str, Any]], finish_reason: str | None
    ) -> str: ...

    def usage_chunk(self, usage: Usage) -> str: ...


class _Stamped:
    """What all objects of one response share. Chunks are put together from text: one is made for every token."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str, *, logprobs: bool, include_usage: bool) -> None:
        """``logprobs``: asked for. ``include_usage``: then each chunk says that its own usage is null."""
        self._logprobs = logprobs
        self._stamp = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        head = {"object": self.chunk_object, **self._stamp}
        self._head = json.dumps(head, ensure_ascii=False)[:-1]
        self._tail = ', "usage": null}' if include_usage else "}"

    def _event(self, index: int, body: str, logprobs: Any, finish_reason: str | None) -> str:
        return (
            f'{self._head}, "choices": [{{"index": {index}, {body}, "logprobs": {_dumps(logprobs)}, '
            f'"finish_reason": {_dumps(finish_reason)}}}]{self._tail}'
        )

    def usage_chunk(self, usage: Usage) -> str:
        return f'{self._head}, "choices": [], "usage": {_dumps(usage.to_json())}}}'

    def _whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {"object": self.object, **self._stamp, "choices": choices, "usage": usage.to_json()}


class ChatShape(_Stamped):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        shown = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(choice.tokens) if self._logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return self._whole(shown, usage)

    def opening(self, index: int) -> str:
        delta = '"delta": {"role": "assistant", "content": "", "refusal": null}'
        return self._event(index, delta, None, None)

    def chunk(
        self, index: int, text: str, tokens: Sequence[dict[str, Any]], finish_reason: str | None
    ) -> str:
        delta = f'"delta": {{"content": {_dumps(text)}}}' if text else '"delta": {}'
        return self._event(index, delta, chat_logprobs(tokens) if tokens else None, finish_reason)


class CompletionShape(_Stamped):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, *, logprobs: bool, include_usage: bool) -> None:
        super().__init__(model, logprobs=logprobs, include_usage=include_usage)
        self._offsets: dict[int, CompletionLogprobs] = {}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        shown = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": CompletionLogprobs().shape(choice.tokens) if self._logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return self._whole(shown, usage)

    def opening(self, index: int) -> str:
        return ""

    def chunk(
        self, index: int, text: str, tokens: Sequence[dict[str, Any]], finish_reason: str | None
    ) -> str:
        offsets = self._offsets.setdefault(index, CompletionLogprobs())
        logprobs = offsets.shape(tokens) if tokens else None
        return self._event(index, f'"text": {_dumps(text)}', logprobs, finish_reason)


def _dumps(value: Any) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False)
