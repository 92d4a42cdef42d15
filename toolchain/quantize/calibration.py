"""Calibration data: text -> token batches, and the identity of what was used.

Sources: a text file (blank lines are kept: documents are whole files), a JSONL file with ``text`` or ``messages``, a
directory of such files, or the name of a data set on the hub. Token sequences are packed: documents are joined with the
end token between them and cut to equal lengths, so that no calibration token is padding.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import sha256_json
from toolchain.plan.types import Calibration

TEXT_SUFFIXES = (".txt", ".md", ".py")
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
    from transformers import AutoTokenizer

    source = settings.data or _own_data(model_directory)
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    template = tokenizer.chat_template if settings.chat_template else None
    if settings.chat_template and not template:
        raise UsageError(
            f"{model_directory} has no chat template", hint="omit --chat-template", code="TC-205"
        )
    texts = _texts(source, tokenizer if settings.chat_template else None)
    tokens = _pack(texts, tokenizer, settings, source)
    identity = {
        "source": source,
        "samples": len(tokens),
        "length_tokens": settings.length_tokens,
        "seed": settings.seed,
        "template_sha256": sha256_json(template) if template else None,
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    return CalibrationSet(tokens=tokens, identity=identity)


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


def _texts(source: str, tokenizer: Any | None) -> Iterator[str]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (*TEXT_SUFFIXES, ".jsonl"))
        if not files:
            raise UsageError(
                f"{path} holds no text ({', '.join(TEXT_SUFFIXES)}) or .jsonl file",
                hint="name a file or another directory",
                code="TC-204",
            )
        for file in files:
            yield from _file_texts(file, tokenizer)
    elif path.exists():
        yield from _file_texts(path, tokenizer)
    elif path.suffix in (*TEXT_SUFFIXES, ".jsonl", ".json") or source.startswith(("/", ".", "~")):
        raise UsageError(
            f"calibration data {source} does not exist", hint="check --calib-data", code="TC-204"
        )
    else:
        yield from _hub_texts(source, tokenizer)


def _file_texts(path: Path, tokenizer: Any | None) -> Iterator[str]:
    if path.suffix != ".jsonl":
        yield path.read_text(encoding="utf-8", errors="replace")
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UsageError(f"{path}:{number} is not JSON: {error.msg}", code="TC-204") from error
                yield _row_text(row, f"{path}:{number}", tokenizer)


def _row_text(row: Any, where: str, tokenizer: Any | None) -> str:
    """Text of one record; ``messages`` go through the chat template when one was asked for."""
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        if tokenizer is not None:
            return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        return "\n".join(str(message.get("content", "")) for message in row["messages"])
    if isinstance(row, dict):
        text = next(
            (row[key] for key in ("text", "prompt", "article", "content") if isinstance(row.get(key), str)),
            None,
        )
        if text is not None:
            if tokenizer is not None:
                return str(tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False))
            return text
    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise UsageError(f"{where} has no `text` or `messages` (found {keys})", code="TC-204")


def _hub_texts(name: str, tokenizer: Any | None) -> Iterator[str]:
    """Rows of a hub data set, streamed (``name`` or ``name:config``); offline mode and failures give one error."""
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    try:
        rows = load_dataset(repository, config or None, split="train", streaming=True)
        for index, row in enumerate(rows):
            yield _row_text(row, f"{name} row {index}", tokenizer)
    except (OSError, ValueError, RuntimeError) as error:
        raise ToolchainError(
            f"the data set {name!r} cannot be read from the hub: {type(error).__name__}: {error}",
            hint="check the name, the network and HF_HUB_OFFLINE, or give a local file",
            code="TC-204",
        ) from error
