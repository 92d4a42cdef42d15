"""Text from local files: text, JSONL, Parquet, or a directory of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
PARQUET_SUFFIXES = (".parquet",)
KNOWN_SUFFIXES = JSONL_SUFFIXES + TEXT_SUFFIXES + PARQUET_SUFFIXES
"""Files of a directory that are read; a single file of any other name is read as text as well."""
PARQUET_ROWS = 256
"""Rows that are decoded at a time."""

Message = dict[str, str]
Sample = str | list[Message]
"""A text, or a conversation that the chat template of the tokenizer turns into one."""


def read_texts(path: Path) -> Iterator[Sample]:
    """Samples of a text file (one), a JSONL file (one per line), a Parquet file (one per row), or a directory of
    them in order of their names.

    Lines of JSONL, like rows of Parquet, are objects with ``text`` (a string) or ``messages`` (a list of role and
    content); blank lines and empty texts are skipped. Raises UsageError (TC-520) when there is nothing,
    ToolchainError (TC-521) with file and line for what cannot be read.
    """
    path = Path(path)
    found = False
    for file in _files(path):
        for sample in _read(file):
            if sample:
                found = True
                yield sample
    if not found:
        raise UsageError(f"{path} holds no text", hint="see `toolchain explain TC-520`", code="TC-520")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(
            f"{path} does not exist",
            hint="give a text, JSONL or Parquet file, or a directory of them",
            code="TC-520",
        )
    return sorted(file for file in path.rglob("*") if file.suffix in KNOWN_SUFFIXES and file.is_file())


def _read(file: Path) -> Iterator[Sample]:
    if file.suffix in PARQUET_SUFFIXES:
        yield from _read_parquet(file)
        return
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ToolchainError(
            f"{file} is not UTF-8 text: {error}", hint="convert it to UTF-8", code="TC-521"
        ) from error
    if file.suffix not in JSONL_SUFFIXES:
        yield text
        return
    # Not splitlines(): it also splits at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _sample(line, f"{file}:{number}")


def _read_parquet(file: Path) -> Iterator[Sample]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield sample_of(row, f"{file} row {number}")
                    number += 1
    except pyarrow.ArrowException as error:
        raise ToolchainError(
            f"{file} is not a Parquet file that can be read: {error}", hint="fetch it again", code="TC-521"
        ) from error


def _sample(line: str, where: str) -> Sample:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise _bad(where, f"not JSON: {error}") from error
    return sample_of(value, where)


TEXT_KEYS = ("text", "article", "prompt", "content")
"""Fields that hold the text of a record, in the order in which they are tried."""


def sample_of(value: Any, where: str) -> Sample:
    """The text or conversation of one record; ToolchainError TC-521 names ``where`` it stands."""
    for key in TEXT_KEYS:
        if isinstance(value, dict) and isinstance(value.get(key), str):
            return str(value[key])
    if isinstance(value, dict) and _is_conversation(value.get("messages")):
        return [{"role": item["role"], "content": item["content"]} for item in value["messages"]]
    raise _bad(where, 'expected an object with "text" (a string) or "messages" (role and content, strings)')


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in value
    )


def _bad(where: str, problem: str) -> ToolchainError:
    return ToolchainError(f"{where}: {problem}", hint="mend or remove the line", code="TC-521")
