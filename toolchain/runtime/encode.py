"""Prompts to token ids: what cannot fit is refused before it is tokenized, and a long text does not hold up others."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

from toolchain.core.errors import UsageError

LONG_BYTES = 32 * 1024
"""Texts beyond this are tokenized by a tokenizer of their own: a megabyte takes about a second."""
LEAST_LONGEST = 16
"""Bytes granted to the longest token of a vocabulary of single bytes: normalizers may shorten what comes in."""


class Encoder:
    """Thread-safe ``tokenizer(text)`` for prompts of at most ``max_seq_len - 1`` tokens."""

    def __init__(self, tokenizer: Any, max_seq_len: int) -> None:
        self._tokenizer = tokenizer
        self._long: Any = None
        self._lock = threading.Lock()
        self._long_lock = threading.Lock()
        self._max_seq_len = max_seq_len
        self.max_bytes = max_seq_len * max(LEAST_LONGEST, longest_token(tokenizer))
        """A text with more UTF-8 bytes cannot fit, whatever its tokens are. (A tokenizer that maps a whole run of
        unknown characters to one token could squeeze more into less; no causal LM of today has one.)"""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Raises UsageError (TC-503) for one that is too long, or is not valid Unicode."""
        size = self._size(text)
        if size > self.max_bytes:
            raise UsageError(
                f"the prompt has {size} bytes; max_seq_len is {self._max_seq_len} with the answer, and that many "
                f"tokens hold at most {self.max_bytes} bytes",
                hint="shorten the prompt, or build an engine with a larger --max-seq-len",
                code="TC-503",
            )
        if size <= LONG_BYTES:
            with self._lock:  # fast tokenizers refuse concurrent use
                return _ids(self._tokenizer, text, add_special_tokens)
        with self._long_lock:
            if self._long is None:
                with self._lock:
                    self._long = copy.deepcopy(self._tokenizer)
            return _ids(self._long, text, add_special_tokens)

    def chat(self, messages: list[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the tokenizer's chat template, with the generation prompt."""
        with self._lock:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.encode(text, add_special_tokens=False)

    def _size(self, text: str) -> int:
        if len(text) > self.max_bytes:
            return len(text)
        try:
            return len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the prompt is not valid Unicode: {error}",
                hint="send UTF-8 text without lone surrogates",
                code="TC-503",
            ) from error


def longest_token(tokenizer: Any) -> int:
    """Most UTF-8 bytes that one token of the vocabulary stands for."""
    pieces = tokenizer.get_vocab()
    if is_byte_level(tokenizer):
        # Each character of a piece stands for one byte, but for added tokens, which stand for themselves.
        added = (str(token) for token in tokenizer.get_added_vocab())
        return max([*map(len, pieces), *(len(token.encode("utf-8")) for token in added)], default=1)
    return max((len(piece.encode("utf-8", "replace")) for piece in pieces), default=1)


def is_byte_level(tokenizer: Any) -> bool:
    """Whether each character of a token stands for one byte (byte-level BPE, as GPT-2, Qwen and Llama 3 have it)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()


def _ids(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
