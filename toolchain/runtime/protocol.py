"""Messages between the worker process and its parent: JSON objects, one per line (README.md lists them)."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.runtime.token_text import TokenText
from toolchain.runtime.types import Chunk, SamplingParams, TokenLogprob

NO_REQUEST = -1
"""Id of an error that belongs to no request, such as a line that is not JSON."""
UNAVAILABLE = frozenset({"TC-505", "TC-506", "TC-512"})
"""Errors after which the same request may succeed later or elsewhere."""
CANCELLED = frozenset({"TC-513"})
"""Errors of requests that were ended because their sender wanted that."""
LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON has no number for (as in OpenAI's API)."""
_KINDS: dict[str, tuple[Any, ...]] = {
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int,),
    "ignore_eos": (bool,),
    "exclude_input_from_output": (bool,),
    "frequency_penalty": (int, float),
    "presence_penalty": (int, float),
    "repetition_penalty": (int, float),
    "logprobs": (int,),
    "add_special_tokens": (bool,),
}
_FIELDS = frozenset({"op", "id", "text_input", "params", "stream", "timeout_s"})


@dataclass(frozen=True, kw_only=True)
class Generate:
    """A checked ``generate`` message."""

    text_input: str
    params: SamplingParams
    stream: bool
    timeout_s: float | None


def parse_generate(message: dict[str, Any]) -> Generate:
    """Raises UsageError for what is missing, unknown or of a wrong type."""
    text, stream, timeout_s = message.get("text_input"), message.get("stream"), message.get("timeout_s")
    if not isinstance(text, str):
        raise _bad(f'expected a string "text_input", got {type(text).__name__}')
    unknown = sorted(set(message) - _FIELDS)
    if unknown:
        raise _bad(f"unknown fields {', '.join(unknown)}")
    if stream is not None and not isinstance(stream, bool):
        raise _bad(f'expected "stream" to be true or false, got {_short(stream)}')
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if timeout_s is not None and not (number and 0 < timeout_s < float("inf")):
        raise _bad(f'expected "timeout_s" to be a number of seconds above 0, got {_short(timeout_s)}')
    return Generate(
        text_input=text,
        params=parse_params(message.get("params")),
        stream=stream is not False,
        timeout_s=timeout_s,
    )


def parse_line(line: bytes) -> dict[str, Any]:
    """One message. Raises UsageError for what is not a JSON object with an ``op``."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _bad(f"not a JSON line: {_short(str(error))}") from error
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise _bad('expected a JSON object with a string "op"')
    return message


def request_id(message: dict[str, Any]) -> int:
    """The ``id`` of a message. Raises UsageError when it is missing or not a non-negative integer."""
    value = message.get("id")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _bad(f'expected a non-negative integer "id", got {_short(value)}')
    return value


def parse_params(value: Any) -> SamplingParams:
    """Sampling parameters; null and absent ones take defaults. Raises UsageError naming every problem."""
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise _bad(f'expected "params" to be an object, got {type(value).__name__}')
    known = [item.name for item in fields(SamplingParams)]
    problems = [
        f"unknown parameter {name!r} (known: {', '.join(known)})" for name in value if name not in known
    ]
    settings: dict[str, Any] = {}
    for name, item in value.items():
        if name not in known or item is None:
            continue
        problem = _check(name, item)
        if problem:
            problems.append(problem)
        else:
            settings[name] = tuple(item) if name == "stop" else item
    if problems:
        raise UsageError("bad sampling parameters: " + "; ".join(problems), code="TC-501")
    return SamplingParams(**settings)


def error_message(identity: int, error: ToolchainError) -> dict[str, Any]:
    """The ``error`` message for a failed request (or ``NO_REQUEST``)."""
    if error.code in UNAVAILABLE:
        kind = "unavailable"
    elif error.code in CANCELLED:
        kind = "cancelled"
    else:
        kind = "invalid_argument" if isinstance(error, UsageError) else "internal"
    text = f"{error.message}; {error.hint}" if error.hint else error.message
    return {"op": "error", "id": identity, "kind": kind, "message": f"{error.code}: {text}"}


def chunk_fields(identity: int, chunk: Chunk, tokens: TokenText) -> dict[str, Any]:
    """One entry of a ``chunks`` message. What it has nothing to say about is left out: there is one per token."""
    fields_: dict[str, Any] = {"id": identity, "text": chunk.text, "token_ids": chunk.token_ids}
    if chunk.logprobs:
        fields_["logprobs"] = [_logprob_fields(item, tokens) for item in chunk.logprobs]
    if chunk.finish_reason is None:
        return fields_
    fields_ |= {"finish_reason": chunk.finish_reason, "prompt_tokens": chunk.prompt_tokens}
    if chunk.stop_reason is not None:
        fields_["stop_reason"] = chunk.stop_reason
    if chunk.cumulative_logprob is not None:
        fields_["cumulative_logprob"] = _finite(chunk.cumulative_logprob)
    if chunk.times is not None:
        fields_["times_ns"] = [
            chunk.times.arrival_ns,
            chunk.times.first_scheduled_ns,
            chunk.times.first_token_ns,
            chunk.times.last_token_ns,
        ]
    return fields_


def _logprob_fields(item: TokenLogprob, tokens: TokenText) -> dict[str, Any]:
    return {
        **_token_fields(item.token_id, item.logprob, tokens),
        "top": [_token_fields(token, logprob, tokens) for token, logprob in item.top],
    }


def _token_fields(token_id: int, logprob: float, tokens: TokenText) -> dict[str, Any]:
    return {
        "token_id": token_id,
        "token": tokens.text(token_id),
        "bytes": tokens.utf8(token_id),
        "logprob": _finite(logprob),
    }


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def _check(name: str, item: Any) -> str:
    if name == "stop":
        fine = isinstance(item, list) and all(isinstance(text, str) for text in item)
        return "" if fine else f"stop: expected a list of strings, got {_short(item)}"
    kinds = _KINDS[name]
    if not isinstance(item, kinds) or (isinstance(item, bool) and bool not in kinds):
        return f"{name}: expected {' or '.join(kind.__name__ for kind in kinds)}, got {_short(item)}"
    return ""


def _short(item: Any) -> str:
    """A client's value in an error message: as much as is useful."""
    text = repr(item)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _bad(text: str) -> UsageError:
    return UsageError(f"bad message: {text}", code="TC-511")
