"""Training data: documents -> token sequences of equal length, held-out ones of other documents, and their identity.

Everything that can be wrong with the data is found here, before a weight is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolchain.core.errors import UsageError
from toolchain.core.files import sha256_json
from toolchain.core.progress import Progress, Silent
from toolchain.data.overlap import KEPT_TRAINED, copied_fraction, sketch
from toolchain.data.tokenized import tokenizer_hash
from toolchain.data.tokenizer import load_tokenizer
from toolchain.models.config import read_config, text_config
from toolchain.plan.steps import Training
from toolchain.qat.documents import Document, Pile, tokenized

MOST_COPIED = 0.05
"""Share of the held-out windows that may stand in the training text: quotations and imports recur in any two texts."""
POOL_FACTOR = 8
"""Few steps see sequences of many documents, instead of all sequences of few."""
MOST_HELD_OUT = 0.5
"""Share of the documents that may go to the held-out side until that is one sequence long."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What is trained on, and what early stopping looks at."""

    train: torch.Tensor = field(repr=False)
    """[n, length] int64, every token a real one."""
    held_out: torch.Tensor = field(repr=False)
    """[m, length] int64, of documents that ``train`` has nothing of."""
    identity: dict[str, Any]
    """Sources, counts and hashes of both sides, for manifests."""
    train_sketch: str = field(default="", repr=False)
    """Of ``train`` (``toolchain.data.overlap``): travels with the checkpoint, so that evaluation can tell."""


def load_sequences(training: Training, source: Path, progress: Progress | None = None) -> Sequences:
    """Sequences for ``training`` with the tokenizer of the model directory ``source``.

    Documents are joined with the end token between them and cut to ``length_tokens``; copies are dropped. Where
    ``steps`` is a part of an epoch, its sequences are drawn from ``POOL_FACTOR`` times as many. Raises UsageError:
    TC-192 too little data, TC-193 ids or tokenizer of another model, TC-194 held-out text that is trained on, TC-205 no
    chat template, TC-207 no tokenizer, TC-520 no text; ToolchainError TC-521 (file, line) for what cannot be read.
    """
    progress = progress or Silent()
    reader = _Reader(training, source)
    pile = _piled(training.data, training.seed, progress)
    documents = pile.ordered()
    if training.held_out:
        beside = _piled(training.held_out, training.seed, progress)
        held_out, taken = reader.packed(beside.ordered(), reader.held_out_sequences), 0
        if not len(held_out.rows):
            raise _too_short(held_out.tokens, training, "--held-out")
    else:
        held_out, taken = reader.split(documents)
    train = reader.drawn(documents[taken:])
    if pile.duplicates:
        progress.note(
            f"dropped {pile.duplicates} of {pile.seen} training documents: they are copies of others"
        )
    copied = _refuse_copies(train.rows, held_out.rows, training)
    identity = {
        "sources": list(training.data),
        "held_out_sources": list(training.held_out),
        "documents": {"seen": pile.seen, "duplicates_dropped": pile.duplicates, "train": train.documents,
                      "held_out": held_out.documents},
        "sequences": {"train": len(train.rows), "held_out": len(held_out.rows)},
        "tokens": {"train": train.rows.size, "held_out": held_out.rows.size},
        "train_sha256": _sha256(train.rows),
        "held_out_sha256": _sha256(held_out.rows),
        "held_out_copied": round(copied, 4),
        "length_tokens": training.length_tokens,
        "template_sha256": reader.template_sha256,
        "tokenizer_sha256": reader.tokenizer_sha256,
        "seed": training.seed,
    }  # fmt: skip
    return Sequences(
        train=torch.from_numpy(train.rows),
        held_out=torch.from_numpy(held_out.rows),
        identity=identity,
        train_sketch=sketch(train.rows, KEPT_TRAINED),
    )


def _piled(sources: tuple[str, ...], seed: int, progress: Progress) -> Pile:
    if not sources:
        raise UsageError("no training data", hint="give --data a text or JSONL file", code="TC-192")
    pile = Pile(seed=seed)
    pile.read(sources, progress)
    return pile


@dataclass(frozen=True, kw_only=True)
class _Packed:
    rows: np.ndarray
    """[sequences, length] int64."""
    tokens: int
    """Tokens there were, the rest that fills no sequence included."""
    documents: int
    """Documents that were read for them."""


class _Reader:
    """Turns documents into sequences for one model."""

    def __init__(self, training: Training, source: Path) -> None:
        self.training, self.source = training, source
        self.tokenizer = load_tokenizer(source)
        self.tokenizer_sha256 = tokenizer_hash(source)
        template = self.tokenizer.chat_template if training.chat_template else None
        if training.chat_template and not template:
            raise UsageError(f"{source} has no chat template", hint="omit --chat-template", code="TC-205")
        self.template_sha256 = sha256_json(template) if template else None
        self.vocabulary = _vocabulary(self.tokenizer, source)
        self.held_out_sequences = max(1, training.held_out_tokens // training.length_tokens)
        self.per_step = training.batch_size * training.accumulate * training.devices

    def packed(self, documents: Iterable[Document], most: int | None) -> _Packed:
        """At most ``most`` sequences of ``documents``; no more are tokenized than it takes."""
        length, rows, rest, read, total = self.training.length_tokens, [], np.empty(0, dtype=np.int64), 0, 0
        for ids in self._tokenized(documents):
            read, total = read + 1, total + len(ids)
            rest = np.concatenate([rest, ids])
            whole = len(rest) // length
            rows += list(rest[: whole * length].reshape(whole, length))
            rest = rest[whole * length :]
            if most is not None and len(rows) >= most:
                break
        made = np.stack(rows[:most]) if rows else np.empty((0, length), dtype=np.int64)
        return _Packed(rows=made, tokens=total, documents=read)

    def split(self, documents: list[Document]) -> tuple[_Packed, int]:
        """The held-out side of ``documents``, from their start, and how many it took."""
        training, count, tokens = self.training, 0, 0
        share = max(1, round(training.held_out_share * len(documents)))
        enough = self.held_out_sequences * training.length_tokens
        for ids in self._tokenized(documents):
            if tokens >= enough or (count >= share and tokens >= training.length_tokens):
                break
            count, tokens = count + 1, tokens + len(ids)
        if count > MOST_HELD_OUT * len(documents) or tokens < training.length_tokens:
            raise _cannot_split(len(documents), tokens, training)
        return self.packed(documents[:count], self.held_out_sequences), count

    def drawn(self, documents: list[Document]) -> _Packed:
        """The training side, shuffled. UsageError TC-192 for less than one optimizer step."""
        training, wanted = self.training, self.training.steps * self.per_step
        train = self.packed(documents, POOL_FACTOR * wanted or None)
        if len(train.rows) < self.per_step:
            raise UsageError(
                f"the training documents give {train.tokens} tokens, one optimizer step needs "
                f"{self.per_step * training.length_tokens}: {training.devices} devices x batch size "
                f"{training.batch_size} x {training.accumulate} accumulated x {training.length_tokens} tokens",
                hint="give more text, or a smaller --length, --batch-size or --accumulate",
                code="TC-192",
            )
        order = np.random.default_rng(training.seed).permutation(len(train.rows))
        return replace(train, rows=train.rows[order[: wanted or None]])

    def _tokenized(self, documents: Iterable[Document]) -> Iterable[np.ndarray]:
        for ids in tokenized(
            documents,
            self.tokenizer,
            chat_template=self.training.chat_template,
            tokenizer_sha256=self.tokenizer_sha256,
            model=self.source,
        ):
            if len(ids) and int(ids.max()) >= self.vocabulary:
                raise _unknown_id(int(ids.max()), self.vocabulary)
            yield ids


def _vocabulary(tokenizer: Any, source: Path) -> int:
    """Rows of the embedding; UsageError TC-193 when the tokenizer has ids beyond them."""
    size = text_config(read_config(source)).get("vocab_size")
    if not isinstance(size, int):
        return 2**31
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= size:
        raise UsageError(
            f"the tokenizer in {source} knows ids up to {largest}, the model's embedding ends at {size - 1} "
            f"(vocab_size {size})",
            hint="this tokenizer belongs to another model: put the right one beside config.json",
            code="TC-193",
        )
    return size


def _unknown_id(found: int, size: int) -> UsageError:
    return UsageError(
        f"the training data holds token {found}, the model's embedding ends at {size - 1} (vocab_size {size})",
        hint="these ids were made with the tokenizer of another model: give the text, or ids of this one",
        code="TC-193",
    )


def _too_short(tokens: int, training: Training, what: str) -> UsageError:
    return UsageError(
        f"{what} gives {tokens} tokens, one sequence needs {training.length_tokens}",
        hint="give more text, or a smaller --length",
        code="TC-192",
    )


def _cannot_split(documents: int, tokens: int, training: Training) -> UsageError:
    """One document is never on both sides, so few long ones cannot be divided."""
    return UsageError(
        f"{documents} distinct training documents cannot be divided into a training and a held-out side of at least "
        f"{training.length_tokens} tokens (the held-out side would take more than half of them, {tokens} tokens)",
        hint="give --held-out text of its own, more documents (JSONL has one per line), or a smaller --length",
        code="TC-192",
    )


def _refuse_copies(train: np.ndarray, held_out: np.ndarray, training: Training) -> float:
    """Share of the held-out windows that are trained on; UsageError TC-194 when it is large."""
    copied = copied_fraction(list(train), held_out.reshape(-1))
    if copied > MOST_COPIED:
        where = ", ".join(training.held_out) or "the documents that were held out"
        raise UsageError(
            f"{copied:.0%} of the held-out text ({where}) also stands in the training text",
            hint="take it out of one of the two"
            if training.held_out
            else "the documents repeat each other: give --held-out text of its own, or remove near copies",
            code="TC-194",
        )
    return copied


def _sha256(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()
