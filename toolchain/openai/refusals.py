"""What the API has and this endpoint does not, refused by name; and what validation found, in readable form."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from toolchain.openai.failures import ApiError, bad_field
from toolchain.openai.fields import ChatRequest, CompletionRequest, Sampling

SHOWN = 3
"""Problems of one request that a message names."""
_BRANCHES = (
    "str",
    "bool",
    "int",
    "float",
    "list",
    "dict",
    "constrained",
    "literal",
    "function",
    "Message",
    "Part",
)


def refuse_unsupported(request: Sampling) -> None:
    """ApiError 400 for a field with a value that the engine cannot follow; neutral values pass."""
    if request.logit_bias:
        raise bad_field("logit_bias", "not supported by this engine; leave it out")
    if request.min_p:
        raise bad_field("min_p", "not supported by this engine; use top_p or top_k")
    if request.response_format is not None and request.response_format.type != "text":
        kind = request.response_format.type
        raise bad_field(
            "response_format", f"{kind!r} is not supported: answers are not constrained; only 'text'"
        )
    if request.stream_options is not None and not request.stream:
        raise bad_field("stream_options", "only with stream: true")
    if isinstance(request, ChatRequest):
        _refuse_chat(request)
    elif isinstance(request, CompletionRequest):
        _refuse_completion(request)


def _refuse_chat(request: ChatRequest) -> None:
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_field("top_logprobs", "only with logprobs: true")
    if request.modalities not in (None, ["text"]):
        raise bad_field("modalities", "only ['text']: this engine answers in text")
    if request.tool_choice not in (None, "none", "auto"):
        raise bad_field(
            "tool_choice",
            "only 'none' and 'auto': calls of tools are neither forced nor parsed by this endpoint",
        )
    if request.tool_choice is not None and not request.tools and request.tool_choice != "none":
        raise bad_field("tool_choice", "only with tools")


def _refuse_completion(request: CompletionRequest) -> None:
    if request.best_of not in (None, 1):
        raise bad_field("best_of", "not supported; ask for n answers and choose")
    if request.suffix:
        raise bad_field("suffix", "not supported: the engine does not fill in before a given end")
    if request.echo and request.logprobs is not None:
        raise bad_field(
            "logprobs", "not together with echo: the engine has none for the tokens of the prompt"
        )


def from_validation(errors: Sequence[Any]) -> ApiError:
    """400 for the errors of pydantic's validation, in the order of the request; unknown fields with the nearest."""
    if any(error["type"] == "json_invalid" for error in errors):
        found = errors[0].get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not valid JSON: {found}", code="invalid_json")
    problems: dict[str, str] = {}
    for error in errors:
        where = _where(error["loc"])
        problems.setdefault(where, _problem(error, where))
    # Of a field with several types each has complained; the one that looked deepest is the one that was meant.
    problems = {
        where: problem
        for where, problem in problems.items()
        if not any(other.startswith(f"{where}.") for other in problems)
    }
    shown = list(problems.items())[:SHOWN]
    text = "; ".join(f"{where}: {problem}" if where else problem for where, problem in shown)
    if len(problems) > SHOWN:
        text += f"; and {len(problems) - SHOWN} more"
    return ApiError(400, text, param=shown[0][0] or None)


def _where(location: Sequence[Any]) -> str:
    """``messages.0.content`` of a location, without "body" and the names of a union's branches."""
    parts = [str(part) for part in location if part != "body"]
    kept = [part for part in parts if part.split("[")[0].split("-")[0] not in _BRANCHES]
    return ".".join(kept)


def _problem(error: Any, where: str) -> str:
    if error["type"] != "extra_forbidden":
        if not where and error["type"] != "value_error":
            return "expected a JSON object with content-type application/json"
        found = str(error["msg"]).removeprefix("Value error, ")
        wanted = found.removeprefix("Input should be ")
        return found if wanted == found else f"{wanted} expected"
    known = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    if where in known:
        return "not a field of this endpoint"
    near = difflib.get_close_matches(where.rpartition(".")[2], known, n=1)
    return "unknown field" + (f"; did you mean {near[0]!r}?" if near else "")
