"""From a request to the prompts that the model gets, counted and within its context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from toolchain.openai.failures import ApiError, bad_field, too_long
from toolchain.openai.fields import ChatRequest, CompletionRequest, Message
from toolchain.openai.texts import Texts, count_tokens, decode_exactly, render_chat

KINDS_OF_PARTS = "this engine takes and gives text only"
_OWN = frozenset({
    "messages", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token", "pad_token",
    "raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner",
    "conversation", "chat_template", "tokenize", "documents",
})  # fmt: skip
"""Variables of chat templates that are not the client's to set: transformers', Jinja's own, and arguments of
``apply_chat_template``."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    text: str
    special: bool
    """Whether the model shall put BOS and the like around it; a chat template has written its own."""
    tokens: int
    """Its length, those included."""


async def chat_prompt(request: ChatRequest, texts: Texts, max_seq_len: int | None) -> Prompt:
    """The prompt of a conversation. Raises ApiError 400."""
    if not texts.has_template:
        raise ApiError(
            400,
            "this model has no chat template: it is a base model. Use /v1/completions, or serve it with a template",
            param="messages",
            code="no_chat_template",
        )
    messages = [_plain(message, index, texts) for index, message in enumerate(request.messages)]
    variables = _variables(request, texts)
    size = sum(len(message["content"] or "") for message in messages)
    if max_seq_len is not None and texts.exceeds(size, max_seq_len):
        raise too_long(f"more than {max_seq_len}", max_seq_len)
    text = await texts.run(size, partial(render_chat, messages=messages, variables=variables))
    return await _counted(text, texts, max_seq_len, special=False, param="messages")


async def completion_prompts(
    request: CompletionRequest, texts: Texts, max_seq_len: int | None
) -> list[Prompt]:
    """The prompts of a completion, in their order. Raises ApiError 400."""
    prompts: list[Prompt] = []
    for given in _listed(request.prompt):
        if not given:
            raise bad_field("prompt", "is empty: expected at least one token")
        if isinstance(given, str):
            text, special = given, True
        else:
            if max_seq_len is not None and len(given) > max_seq_len:
                raise too_long(len(given), max_seq_len, param="prompt")
            text, special = await texts.run(len(given), partial(decode_exactly, ids=given)), False
        prompts.append(await _counted(text, texts, max_seq_len, special=special, param="prompt"))
    return prompts


def _listed(prompt: Any) -> list[Any]:
    """A text, texts, token ids or lists of them -> the list of prompts."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise bad_field("prompt", "is empty: expected at least one prompt")
    return list(prompt)


async def _counted(text: str, texts: Texts, limit: int | None, *, special: bool, param: str) -> Prompt:
    if limit is not None and texts.exceeds(len(text), limit):
        raise too_long(f"more than {limit}", limit, param=param)
    tokens = await texts.run(len(text), partial(count_tokens, text=text, special=special))
    if limit is not None and tokens >= limit:
        raise too_long(tokens, limit, param=param)
    return Prompt(text=text, special=special, tokens=tokens)


def _plain(message: Message, index: int, texts: Texts) -> dict[str, Any]:
    """``message`` as chat templates read it: content as one text, arguments of calls as objects."""
    role = message.role
    if role == "developer":
        # The newer name of "system"; templates know the older one.
        role = "system"
    plain: dict[str, Any] = {"role": role, "content": _content(message, index)}
    if message.tool_calls:
        plain["tool_calls"] = [_with_arguments(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            plain[name] = value
    return plain


def _content(message: Message, index: int) -> str:
    where = f"messages.{index}.content"
    if message.content is None:
        if message.role == "assistant":
            return message.refusal or ""
        raise bad_field(where, f"is missing: a message of role {message.role!r} needs a text")
    if isinstance(message.content, str):
        return message.content
    texts = []
    for number, part in enumerate(message.content):
        if part.type != "text":
            raise bad_field(
                f"{where}.{number}", f"a part of type {part.type!r} is not supported: {KINDS_OF_PARTS}"
            )
        if part.text is None:
            raise bad_field(f"{where}.{number}.text", "is missing")
        texts.append(part.text)
    return "".join(texts)


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI sends the arguments of a call as JSON text, templates write them out as an object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _variables(request: ChatRequest, texts: Texts) -> dict[str, Any]:
    """Variables for the template beside the messages; ApiError 400 for those that it does not read."""
    variables: dict[str, Any] = {}
    if request.tools and request.tool_choice != "none":
        if "tools" not in texts.template_variables:
            raise bad_field("tools", "the chat template of this model takes no tools")
        variables["tools"] = request.tools
    given = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        given.setdefault("reasoning_effort", request.reasoning_effort)
    allowed = texts.template_variables - _OWN - {"tools"}
    _refuse_unknown(sorted(set(given) - allowed), sorted(allowed))
    return {**given, **variables}


def _refuse_unknown(unknown: Sequence[str], allowed: Sequence[str]) -> None:
    if unknown:
        raise bad_field(
            "reasoning_effort" if unknown == ["reasoning_effort"] else "chat_template_kwargs",
            f"the chat template of this model has no {', '.join(unknown)}; it reads {', '.join(allowed) or 'none'}",
        )
