"""Samples to one row of tokens, and which token begins a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.data.sources import read_source
from toolchain.data.texts import Sample

LOOK_AHEAD = 64
"""How many times ``max_tokens`` are encoded at most, to choose from."""


def encode_sources(
    tokenizer: Any, sources: Sequence[str | Path], *, max_tokens: int, window: int
) -> list[int]:
    """``encode_samples`` of several sources, an equal share of whole windows from each, in their order."""
    share = max_tokens
    if len(sources) > 1:
        share = max(window, max_tokens // len(sources) // window * window)
    parts = [
        encode_samples(tokenizer, read_source(source), max_tokens=share, window=window) for source in sources
    ]
    return [token for part in parts for token in part]


def encode_samples(tokenizer: Any, samples: Iterable[Sample], *, max_tokens: int, window: int) -> list[int]:
    """At most ``max_tokens`` token ids: all of the samples, or windows spread evenly over them.

    The head alone would judge a model on the first document or two; perplexity differs between documents by more than
    quantization changes it. Every chosen window is a run of ``window`` tokens as they stand.

    Texts are encoded without special tokens and separated by the end token, if there is one, as in training
    corpora; conversations carry the special tokens of their chat template. BOS is put before every window
    later.
    """
    if window < 2 or max_tokens < 2:
        raise UsageError(
            f"cannot evaluate {max_tokens} tokens with window {window}",
            hint="both must be at least 2",
            code="TC-523",
        )
    tokens: list[int] = []
    for sample in samples:
        if tokens and tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        tokens.extend(tokenizer(_text_of(tokenizer, sample), add_special_tokens=False)["input_ids"])
        if len(tokens) >= LOOK_AHEAD * max_tokens:
            break
    return _spread(tokens, max_tokens, window)


def _spread(tokens: list[int], max_tokens: int, window: int) -> list[int]:
    count = max_tokens // window
    if len(tokens) <= max_tokens or count < 2:
        return tokens[:max_tokens]
    last = len(tokens) - window
    starts = [index * last // (count - 1) for index in range(count)]
    return [token for start in starts for token in tokens[start : start + window]]


def begin_token(tokenizer: Any) -> int | None:
    """The BOS id when the tokenizer puts one before every text by itself (Llama, Mixtral, DeepSeek), else
    None."""
    bos = tokenizer.bos_token_id
    encoded = tokenizer("a")["input_ids"]
    return bos if bos is not None and encoded[:1] == [bos] else None


def token_hash(tokens: list[int]) -> str:
    """SHA-256 over the ids, as 4-byte little-endian numbers: names the data of a measurement."""
    return hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in tokens)).hexdigest()


def _text_of(tokenizer: Any, sample: Sample) -> str:
    if isinstance(sample, str):
        return sample
    if not tokenizer.chat_template:
        raise UsageError(
            "the data holds conversations, but the tokenizer has no chat template",
            hint='give data with "text", or add the chat template to the checkpoint',
            code="TC-521",
        )
    text: str = tokenizer.apply_chat_template(sample, tokenize=False)
    return text
