"""Documents of calibration: from files or the hub, in seeded order, without copies.

Sources are whatever ``toolchain.data`` reads (text, JSONL with ``text`` or ``messages``, a directory of them), or the
name of a data set on the hub.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.data.hub import read_hub_texts
from toolchain.data.texts import JSONL_SUFFIXES, TEXT_SUFFIXES, Sample, read_texts


class Documents:
    """Reads sources one after the other and remembers what it has seen: a copy anywhere after is dropped.

    Web text and mixed data sets repeat documents; each copy would weigh in ranges and searches as if it were new.
    """

    def __init__(self, *, seed: int, most: int) -> None:
        """``most`` documents of each source are read: a hub data set is a stream without end, and is shuffled within
        its head."""
        self._seed, self._most = seed, most
        self._known: set[bytes] = set()
        self.seen = 0
        self.duplicates = 0

    def read(self, source: str) -> Iterator[Sample]:
        """The documents of ``source``, shuffled. Nothing is read before the first one is asked for."""
        documents = [sample for sample in islice(_samples(source), self._most) if self._is_new(sample)]
        random.Random(self._seed).shuffle(documents)
        yield from documents

    def _is_new(self, sample: Sample) -> bool:
        """Equal but for white space around the text counts as a copy."""
        text = sample.strip() if isinstance(sample, str) else json.dumps(sample, sort_keys=True)
        digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
        self.seen += 1
        self.duplicates += digest in self._known
        new = digest not in self._known
        self._known.add(digest)
        return new


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


def text_of(sample: Sample, tokenizer: Any, *, use_template: bool) -> str:
    """A sample as the model will see it: through the chat template when that was asked for."""
    if use_template:
        messages = [{"role": "user", "content": sample}] if isinstance(sample, str) else sample
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    return sample if isinstance(sample, str) else "\n".join(message["content"] for message in sample)
