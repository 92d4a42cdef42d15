"""Documents of training: read, without copies, in seeded order, each as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.core.progress import Progress
from toolchain.data.sources import read_source
from toolchain.data.texts import Sample, read_records
from toolchain.data.tokenized import TokenIds, require_same_tokenizer, sample_or_ids
from toolchain.quantize.documents import text_of

HUB_DOCUMENTS = 50_000
"""Most documents of one data set on the hub: it is a stream whose end may never come."""
AT_ONCE = 64
"""Documents tokenized at a time: fast tokenizers share a list out among threads."""

Document = Sample | TokenIds


@dataclass
class Pile:
    """Distinct documents of some sources, in an order that depends on the seed and on each document alone.

    The order is that of hashes, so that a document that is added or taken away moves no other to the held-out side.
    """

    seed: int
    documents: list[Document] = field(default_factory=list, repr=False)
    seen: int = 0
    duplicates: int = 0
    _known: set[bytes] = field(default_factory=set, repr=False)

    def read(self, sources: Iterable[str], progress: Progress) -> None:
        """Every new document of ``sources``; UsageError TC-520, ToolchainError TC-521 as ``toolchain.data`` has it."""
        for source in sources:
            before = self.seen
            for document in _documents(source):
                self._add(document)
            if self.seen - before == HUB_DOCUMENTS and not Path(source).expanduser().exists():
                progress.note(f"{source}: its first {HUB_DOCUMENTS} documents are read, not all of it")

    def ordered(self) -> list[Document]:
        keyed = [
            (hashlib.sha256(b"%d:" % self.seed + _digest(item)).digest(), item) for item in self.documents
        ]
        return [item for _, item in sorted(keyed, key=lambda pair: pair[0])]

    def _add(self, document: Document) -> None:
        """Equal but for white space around the text counts as a copy."""
        digest = _digest(document)
        self.seen += 1
        if digest in self._known:
            self.duplicates += 1
            return
        self._known.add(digest)
        self.documents.append(document)


def _documents(source: str) -> Iterator[Document]:
    path = Path(source).expanduser()
    if path.exists():
        return read_records(path, sample_or_ids)
    return islice(read_source(source), HUB_DOCUMENTS)


def _digest(document: Document) -> bytes:
    if isinstance(document, TokenIds):
        return hashlib.sha256(b"ids:" + document.ids.tobytes()).digest()
    text = document.strip() if isinstance(document, str) else json.dumps(document, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()


def tokenized(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    chat_template: bool,
    tokenizer_sha256: str | None,
    model: Path,
) -> Iterator[np.ndarray]:
    """[tokens] int64 of each document, with the end token behind it; read lazily, in order.

    UsageError TC-193 for ids that another tokenizer made.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = iter(documents)
    while group := list(islice(stream, AT_ONCE)):
        texts = [
            text_of(item, tokenizer, use_template=chat_template)
            for item in group
            if not isinstance(item, TokenIds)
        ]
        ids = iter(tokenizer(texts, add_special_tokens=False).input_ids if texts else ())
        for item in group:
            if not isinstance(item, TokenIds):
                yield np.array([*next(ids), *end], dtype=np.int64)
                continue
            require_same_tokenizer(item, tokenizer_sha256, model)
            ended = bool(end) and int(item.ids[-1]) == end[0]
            yield item.ids if ended else np.append(item.ids, np.array(end, dtype=np.int64))
