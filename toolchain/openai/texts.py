"""The tokenizer of one model: chat templates, token counts, token ids back to text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from toolchain.core.errors import UsageError
from toolchain.data.tokenizer import load_tokenizer
from toolchain.openai.failures import ApiError, bad_field
from toolchain.openai.settings import ServedModel

T = TypeVar("T")
LONG_CHARS = 64 * 1024
"""Texts beyond this are read in a thread of their own, so that short requests never wait behind them."""


class Texts:
    """Safe in any number of tasks. Two threads, each with its own tokenizer: one for short texts, one for long."""

    def __init__(self, served: ServedModel) -> None:
        """Raises UsageError TC-207 for a tokenizer that cannot be used, TC-644 for a template that cannot be read."""
        template = None if served.chat_template is None else _read_template(served.chat_template)
        self._lanes = tuple(_Lane(served.tokenizer, template) for _ in range(2))
        self._longest = self._lanes[0].longest_token

    async def run(self, size: int, work: Callable[[Any], T]) -> T:
        """``work(tokenizer)`` off the event loop. ``size``: characters of the text that it reads."""
        lane = self._lanes[size > LONG_CHARS]
        return await asyncio.get_running_loop().run_in_executor(lane.pool, work, lane.tokenizer)

    @property
    def template_variables(self) -> frozenset[str]:
        """Variables that the chat template reads; empty where there is no template."""
        return self._lanes[0].variables

    @property
    def has_template(self) -> bool:
        return bool(self._lanes[0].tokenizer.chat_template)

    def exceeds(self, characters: int, limit: int) -> bool:
        """True only where so long a text has more than ``limit`` tokens whatever it says: nobody has to count."""
        return characters > (limit + 1) * self._longest

    def close(self) -> None:
        for lane in self._lanes:
            lane.pool.shutdown(wait=False, cancel_futures=True)


class _Lane:
    def __init__(self, directory: Path, template: str | None) -> None:
        self.tokenizer = load_tokenizer(directory)
        if template is not None:
            self.tokenizer.chat_template = template
        if isinstance(self.tokenizer.chat_template, dict):
            templates = self.tokenizer.chat_template
            self.tokenizer.chat_template = templates.get("default") or next(iter(templates.values()))
        self.variables = _variables(self.tokenizer.chat_template, directory)
        self.longest_token = max((len(token) for token in self.tokenizer.get_vocab()), default=1)
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="openai-texts")


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the chat template {path} cannot be read: {error}", code="TC-644") from error


def _variables(template: str | None, directory: Path) -> frozenset[str]:
    """Raises UsageError TC-644 for a template that is no Jinja."""
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not template:
        return frozenset()
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        # transformers has {% generation %} beside Jinja's own tags; for the variables it can go.
        plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        return frozenset(meta.find_undeclared_variables(environment.parse(plain)))
    except TemplateError as error:
        raise UsageError(
            f"the chat template of {directory} is no Jinja template: {error}",
            hint="correct it, or give another one",
            code="TC-644",
        ) from error


def count_tokens(tokenizer: Any, text: str, *, special: bool) -> int:
    """Tokens of ``text``; ``special``: with those that the tokenizer puts around a prompt."""
    return len(tokenizer(text, add_special_tokens=special)["input_ids"])


def render_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> str:
    """The prompt of a conversation, BOS included where the template writes one. ApiError 400 for its refusals."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **variables
        )
    except (
        TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        RecursionError,
    ) as error:
        raise ApiError(
            400, f"messages: the model's chat template refuses them: {error}", param="messages"
        ) from error
    return text


def decode_exactly(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text that encodes to ``ids`` again; the model takes text only. ApiError 400 where there is none."""
    size = len(tokenizer)
    outside = [token for token in ids if token >= size]
    if outside:
        raise bad_field("prompt", f"token ids {outside[:5]} are not in 0..{size - 1}")
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if list(tokenizer(text, add_special_tokens=False)["input_ids"]) != list(ids):
        raise bad_field("prompt", "these token ids are not what their text encodes to; send the text instead")
    return text
