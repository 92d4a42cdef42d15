"""Prompts of a wanted length in tokens, and the counting of tokens, with the engine's own tokenizer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError

WORDS = """import return class value self name path index error string number list config model token layer
weight expert router scale block batch shape dtype file open read write close check match start stop count total
first last next each every other after before while until where which there their about would could should
time house river mountain letter paper window garden market bridge station winter summer morning evening"""


class TokenCounter:
    """The tokenizer of an engine or checkpoint directory."""

    def __init__(self, tokenizer_dir: Path) -> None:
        """Raises UsageError when no tokenizer can be loaded from there."""
        directory = tokenizer_dir / "checkpoint" if (tokenizer_dir / "checkpoint").is_dir() else tokenizer_dir
        self._tokenizer: Any
        try:
            if (directory / "tokenizer.json").is_file():
                from tokenizers import Tokenizer

                self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
                self._fast = True
            else:
                from transformers import AutoTokenizer

                self._tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
                self._fast = False
        except Exception as error:
            raise UsageError(
                f"no tokenizer can be loaded from {directory}: {error}",
                hint="give the engine or checkpoint directory that the server runs",
                code="TC-703",
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        if self._fast:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def count(self, text: str) -> int:
        return len(self.encode(text))


def make_prompts(counter: TokenCounter, *, count: int, tokens: int, seed: int) -> list[str]:
    """``count`` different prompts that the tokenizer splits into ``tokens`` tokens.

    They differ from their first word on, so that a server's prefix cache cannot answer for the model. Where a
    text of exactly that length does not exist (a cut can fall into a character), the prompt is up to a few
    tokens shorter.
    """
    generator = random.Random(seed)
    return [make_prompt(counter, generator, tokens) for _ in range(count)]


def make_prompt(counter: TokenCounter, generator: random.Random, tokens: int) -> str:
    """One prompt of ``tokens`` tokens, or up to a few fewer."""
    words: list[str] = []
    while counter.count(" ".join(words)) < tokens:
        words += generator.choices(WORDS.split(), k=max(8, tokens // 2))
    ids = counter.encode(" ".join(words))
    for length in range(tokens, 0, -1):
        text = counter.decode(ids[:length]).strip()
        if 0 < counter.count(text) <= tokens:
            return text
    return words[0]
