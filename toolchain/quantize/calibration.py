"""Calibration data: text -> token batches, and the identity of what was used.

Token sequences are packed: the documents of a source are joined with the end token between them and cut to equal
lengths, so that no calibration token is padding. Several sources take turns, so each gives the same number of samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from toolchain.core.errors import UsageError
from toolchain.core.files import sha256_json
from toolchain.core.progress import Progress, Silent
from toolchain.data.texts import Sample
from toolchain.data.tokenizer import load_tokenizer
from toolchain.models.config import read_config, text_config
from toolchain.plan.types import Calibration
from toolchain.quantize.documents import Documents, text_of

DEFAULT_FILE = "calibration.jsonl"
"""A model directory may carry its own calibration text under this name."""


POOL_FACTOR = 4
"""Balanced sampling chooses from so many times the samples: each is routed once, so choosing costs that many passes."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    tokens: torch.Tensor = field(repr=False)
    """[samples, length] int64."""
    identity: dict[str, Any]
    """Source, template hash and token hash, for the manifest."""

    def batches(self, size: int) -> list[torch.Tensor]:
        return list(self.tokens.split(size))

    def take(self, rows: list[int]) -> CalibrationSet:
        """These samples alone, with the identity of what was chosen from what."""
        if rows == list(range(len(self.tokens))):
            return self
        tokens = self.tokens[rows]
        pool = {"samples": len(self.tokens), "tokens_sha256": self.identity["tokens_sha256"]}
        chosen = {
            "samples": len(rows),
            "tokens_sha256": _tokens_hash(tokens),
            "chosen_sha256": sha256_json(rows),
        }
        return CalibrationSet(tokens=tokens, identity={**self.identity, **chosen, "pool": pool})


def pool_samples(settings: Calibration) -> int:
    """Samples to read: what is calibrated on, and what that is chosen from."""
    budget = settings.max_samples if settings.min_tokens_per_expert else 0
    factor = POOL_FACTOR if settings.sampling == "balanced" else 1
    return max(factor * settings.samples, budget)


def load_calibration(
    settings: Calibration, model_directory: Path, progress: Progress | None = None
) -> CalibrationSet:
    """Token batches for ``settings``: the whole pool where samples are chosen later (``sampling.select``).

    UsageError when a source does not exist or gives too few tokens.
    """
    sources = settings.sources or (_own_data(model_directory),)
    tokenizer = load_tokenizer(model_directory)
    template = tokenizer.chat_template if settings.chat_template else None
    if settings.chat_template and not template:
        raise UsageError(
            f"{model_directory} has no chat template", hint="omit --chat-template", code="TC-205"
        )
    count, length = pool_samples(settings), settings.length_tokens
    documents = Documents(seed=settings.seed, most=max(4096, 16 * count))
    streams = [
        _windows(documents.read(source), tokenizer, length, source, template is not None)
        for source in sources
    ]
    tokens = torch.tensor(list(islice(_take_turns(streams), count)))
    if documents.duplicates:
        (progress or Silent()).note(
            f"dropped {documents.duplicates} of {documents.seen} calibration documents: they are copies of others"
        )
    _refuse_unknown_ids(tokens, model_directory)
    identity = {
        "source": sources[0] if len(sources) == 1 else list(sources),
        "samples": len(tokens),
        "length_tokens": length,
        "seed": settings.seed,
        "sampling": settings.sampling,
        "documents": documents.seen,
        "duplicates_dropped": documents.duplicates,
        "template_sha256": sha256_json(template) if template else None,
        "tokens_sha256": _tokens_hash(tokens),
    }
    return CalibrationSet(tokens=tokens, identity=identity)


def _tokens_hash(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


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


def _windows(
    documents: Iterator[Sample], tokenizer: Any, length: int, source: str, use_template: bool
) -> Iterator[list[int]]:
    """Documents -> runs of ``length`` tokens. UsageError when they do not give even one."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    short = True
    for document in documents:
        text = text_of(document, tokenizer, use_template=use_template)
        stream += [*tokenizer(text, add_special_tokens=False).input_ids, *end]
        at = 0
        while len(stream) - at >= length:
            short = False
            yield stream[at : at + length]
            at += length
        del stream[:at]
    if short:
        raise UsageError(
            f"{source} gives {len(stream)} tokens, one sample needs {length}",
            hint="use more text or a smaller --calib-length",
            code="TC-204",
        )


def _take_turns(streams: list[Iterator[list[int]]]) -> Iterator[list[int]]:
    """One of each in turn; those that end leave their turns to the others."""
    while streams:
        for stream in list(streams):
            window = next(stream, None)
            if window is None:
                streams.remove(stream)
            else:
                yield window
