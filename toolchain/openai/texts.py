"""The tokenizer of one model: chat templates, token counts, token ids back to text."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from toolchain.core.errors import UsageError
from toolchain.data.tokenizer import load_tokenizer
from toolchain.openai.failures import ApiError, bad_field
from toolchain.openai.settings import ServedModel
from toolchain.runtime.encode import LEAST_LONGEST, LONG_BYTES, longest_token

T = TypeVar("T")


class Texts:
    """Safe in any number of tasks. Two threads, each with its own tokenizer: one for short texts, and one for long ones
    (of LONG_BYTES and more), so that nobody waits behind a megabyte."""

    def __init__(self, served: ServedModel) -> None:
        """Raises UsageError TC-207 for a tokenizer that cannot be used, TC-644 for a template that cannot be read."""
        template = None if served.chat_template is None else _read_template(served.chat_template)
        tokenizer = load_tokenizer(served.tokenizer)
        tokenizer.chat_template = _one_template(template or tokenizer.chat_template)
        self.has_template = bool(tokenizer.chat_template)
        self.template_variables = _variables(
            tokenizer.chat_template, served.chat_template or served.tokenizer
        )
        """What the chat template reads; empty where there is none."""
        self._most_bytes = max(LEAST_LONGEST, longest_token(tokenizer))
        self._short = _Lane(lambda: tokenizer)
        self._long = _Lane(lambda: self._short.pool.submit(copy.deepcopy, tokenizer).result())

    async def run(self, size: int, work: Callable[[Any], T]) -> T:
        """``work(tokenizer)`` off the event loop. ``size``: characters of the text that it reads."""
        lane = self._long if size >= LONG_BYTES else self._short
        return await asyncio.get_running_loop().run_in_executor(lane.pool, lambda: work(lane.tokenizer()))

    def exceeds(self, characters: int, limit: int) -> bool:
        """True only where so long a text has more than ``limit`` tokens whatever it says: nobody has to count."""
        return characters > (limit + 1) * self._most_bytes

    def close(self) -> None:
        for lane in (self._short, self._long):
            lane.pool.shutdown(wait=False, cancel_futures=True)


class _Lane:
    """One thread, with a tokenizer that no other uses."""

    def __init__(self, make: Callable[[], Any]) -> None:
        """``make``: called at the first use, in the lane's thread; a large vocabulary takes 100 MB."""
        self._make = make
        self._tokenizer: Any = None
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="openai-texts")

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._make()
        return self._tokenizer


def _one_template(found: Any) -> str | None:
    """Tokenizers may have several templates by name; "default" is the one for a conversation."""
    if isinstance(found, dict):
        return found.get("default") or next(iter(found.values()), None)
    return found or None


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the chat template {path} cannot be read: {error}", code="TC-644") from error


def _variables(template: str | None, origin: Path) -> frozenset[str]:
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
            f"the chat template of {origin} is no Jinja template: {error}",
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
