"""Tokens to text, one token at a time, without ever emitting half a character."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

REPLACEMENT = "�"
"""What decoders write for bytes that are not (yet) UTF-8."""


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that ``decode(skip_special_tokens=True)`` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if added is None:  # tokenizers that are not built on the tokenizers library
        return frozenset(tokenizer.all_special_ids)
    return frozenset(index for index, token in added.items() if token.special)


class Detokenizer:
    """Incremental ``tokenizer.decode(ids, skip_special_tokens=True)``.

    Decoding tokens alone would lose spaces (SentencePiece drops a leading one) and split characters
    (byte-level vocabularies). So each step decodes a short window twice, with and without the new tokens, and
    emits the difference; the window starts at tokens that are already emitted. Text that ends in U+FFFD waits
    for the tokens that complete it. Special tokens never enter the window: one alone in it would look like
    the start of the text.
    """

    def __init__(self, tokenizer: Any, special: frozenset[int], context: Sequence[int] = ()) -> None:
        """``context``: tokens before the answer that count as emitted (the prompt, when it is echoed)."""
        # A tenth of the cost of the tokenizer's own decode(), which does nothing else when no clean-up is asked for.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = tokenizer
        self._special = special
        self._window: list[int] = self._visible(context)
        self._emitted = len(self._window)
        """How many tokens of the window are emitted; the others wait."""

    def push(self, token_id: int) -> str:
        """Text that becomes certain with this token; may be empty."""
        if token_id in self._special:
            return ""
        self._window.append(token_id)
        return self._advance(final=False)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take tokens without decoding them: ``push`` or ``flush`` gives their text, for the price of one token's."""
        self._window.extend(self._visible(token_ids))

    def flush(self) -> str:
        """The rest, when no more tokens come: incomplete bytes become U+FFFD as in a decode of the whole."""
        return self._advance(final=True)

    def _visible(self, ids: Iterable[int]) -> list[int]:
        return [index for index in ids if index not in self._special]

    def _advance(self, *, final: bool) -> str:
        if self._emitted == len(self._window):
            return ""
        before = self._decode(self._window[: self._emitted])
        text = self._decode(self._window)
        if not final and text.endswith(REPLACEMENT):
            return ""
        # A byte-fallback decoder turns a whole run of bytes into U+FFFD when one of them is bad, so that text
        # already emitted changes afterwards: then only the new tokens are decoded.
        new = text[len(before) :] if text.startswith(before) else self._decode(self._window[self._emitted :])
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return new

    def _decode(self, ids: list[int]) -> str:
        if self._backend is not None:
            text: str = self._backend.decode(ids, skip_special_tokens=False)
        else:
            text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
