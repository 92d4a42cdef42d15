"""Calibration data: text -> token batches, and the identity of what was used.

Sources: whatever ``toolchain.data`` reads (text, JSONL with ``text`` or ``messages``, a directory of them), or the name
of a data set on the hub. Token sequences are packed: documents are joined with the
end token between them and cut to equal lengths, so that no calibration token is padding.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from toolchain.core.errors import UsageError
from toolchain.core.files import sha256_json
from toolchain.data.hub import read_hub_texts
from toolchain.data.texts import JSONL_SUFFIXES, TEXT_SUFFIXES, Sample, read_texts
from toolchain.data.tokenizer import load_tokenizer
from toolchain.models.config import read_config, text_config
from toolchain.plan.types import Calibration

DEFAULT_FILE = "calibration.jsonl"
"""A model directory may carry its own calibration text under this name."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    tokens: torch.Tensor = field(repr=False)
    """[samples, length] int64."""
    identity: dict[str, Any]
    """Source, template hash and token hash, for the manifest."""

    def batches(self, size: int) -> list[torch.Tensor]:
        return list(self.tokens.split(size))


def load_calibration(settings: Calibration, model_directory: Path) -> CalibrationSet:
    """Token batches for ``settings``. UsageError when the source does not exist or gives too few tokens."""
    source = settings.data or _own_data(model_directory)
    tokenizer = load_tokenizer(model_directory)
    template = tokenizer.chat_template if settings.chat_template else None
    if settings.chat_template and not template:
        raise UsageError(
            f"{model_directory} has no chat template", hint="omit --chat-template", code="TC-205"
        )
    texts = (_text(sample, tokenizer, use_template=settings.chat_template) for sample in _samples(source))
    tokens = _pack(texts, tokenizer, settings, source)
    _refuse_unknown_ids(tokens, model_directory)
    identity = {
        "source": source,
        "samples": len(tokens),
        "length_tokens": settings.length_tokens,
        "seed": settings.seed,
        "template_sha256": sha256_json(template) if template else None,
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    return CalibrationSet(tokens=tokens, identity=identity)


def _refuse_unknown_ids(tokens: torch.Tensor, model_directory: Path) -> None:
    """An id without an embedding would end in an index error, on a GPU in a lost CUDA context."""
    vocab_size = text_config(read_config(model_directory)).get("vocab_size")
    largest = int(tokens.max())
    if isinstance(vocab_size, int) and largest >= vocab_size:
        raise UsageError(
            f"the tokenizer gives token {largest}, the model's embedding ends at {vocab_size - 1} "
            f"(vocab_size {vocab_size})",
            hint="this tokenizer belongs to another model: put the right one beside config.json",
            code="TC-207",
        )


def _own_data(model_directory: Path) -> str:
    own = model_directory / DEFAULT_FILE
    if own.is_file():
        return str(own)
    raise UsageError(
        "no calibration data: this format needs text that is like what the model will serve",
        hint="give --calib-data a text or JSONL file, a directory of them, or a hub data set name "
        "(for example abisee/cnn_dailymail)",
        code="TC-204",
    )


def _pack(texts: Iterator[str], tokenizer: Any, settings: Calibration, source: str) -> torch.Tensor:
    """Documents in seeded order -> [samples, length]."""
    wanted = settings.samples * settings.length_tokens
    # A hub data set is a stream without end: shuffle within a bounded head of it.
    documents = list(islice(texts, max(4096, 16 * settings.samples)))
    random.Random(settings.seed).shuffle(documents)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for document in documents:
        stream += [*tokenizer(document, add_special_tokens=False).input_ids, *end]
        if len(stream) >= wanted:
            break
    if len(stream) < settings.length_tokens:
        raise UsageError(
            f"{source} gives {len(stream)} tokens, one sample needs {settings.length_tokens}",
            hint="use more text or a smaller --calib-length",
            code="TC-204",
        )
    count = min(settings.samples, len(stream) // settings.length_tokens)
    return torch.tensor(stream[: count * settings.length_tokens]).view(count, settings.length_tokens)


def _samples(source: str) -> Iterator[Sample]:
    """Local files when the path exists, else a data set on the hub."""
    path = Path(source).expanduser()
    if path.exists():
        return read_texts(path)
    if path.suffix in (*JSONL_SUFFIXES, *TEXT_SUFFIXES) or source.startswith(("/", ".", "~")):
        raise UsageError(
            f"calibration data {source} does not exist", hint="check --calib-data", code="TC-204"
        )
    return read_hub_texts(source)


def _text(sample: Sample, tokenizer: Any, *, use_template: bool) -> str:
    """A sample as the model will see it: through the chat template when that was asked for."""
    if use_template:
        messages = [{"role": "user", "content": sample}] if isinstance(sample, str) else sample
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    return sample if isinstance(sample, str) else "\n".join(message["content"] for message in sample)
