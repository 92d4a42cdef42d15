"""Messages between the worker process and its parent: JSON objects, one per line (README.md lists them)."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.runtime.types import SamplingParams

NO_REQUEST = -1
"""Id of an error that belongs to no request, such as a line that is not JSON."""
UNAVAILABLE = frozenset({"TC-505", "TC-506"})
"""Errors after which the same request may succeed later or elsewhere."""
_KINDS: dict[str, tuple[Any, ...]] = {
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int,),
    "ignore_eos": (bool,),
    "exclude_input_from_output": (bool,),
}


def parse_line(line: bytes) -> dict[str, Any]:
    """One message. Raises UsageError for what is not a JSON object with an ``op``."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _bad(f"not a JSON line: {error}") from error
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise _bad('expected a JSON object with a string "op"')
    return message


def request_id(message: dict[str, Any]) -> int:
    """The ``id`` of a message. Raises UsageError when it is missing or not a non-negative integer."""
    value = message.get("id")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _bad(f'expected a non-negative integer "id", got {value!r}')
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
    else:
        kind = "invalid_argument" if isinstance(error, UsageError) else "internal"
    text = f"{error.message}; {error.hint}" if error.hint else error.message
    return {"op": "error", "id": identity, "kind": kind, "message": text}


def _check(name: str, item: Any) -> str:
    if name == "stop":
        fine = isinstance(item, list) and all(isinstance(text, str) for text in item)
        return "" if fine else f"stop: expected a list of strings, got {item!r}"
    kinds = _KINDS[name]
    if not isinstance(item, kinds) or (isinstance(item, bool) and bool not in kinds):
        return f"{name}: expected {' or '.join(kind.__name__ for kind in kinds)}, got {item!r}"
    return ""


def _bad(text: str) -> UsageError:
    return UsageError(f"bad message: {text}", code="TC-511")
