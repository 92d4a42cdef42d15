"""Text from local files: text, JSONL, Parquet, or a directory of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
    return read_records(path, sample_of)


def read_records(path: Path, parse: Callable[[Any, str], Any]) -> Iterator[Any]:
    """``read_texts`` with another reader of records: (parsed JSON or row, where it stands) -> sample."""
    path = Path(path)
    found = False
    for file in _files(path):
        for sample in _read(file, parse):
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


def _read(file: Path, parse: Callable[[Any, str], Any]) -> Iterator[Any]:
    if file.suffix in PARQUET_SUFFIXES:
        yield from _read_parquet(file, parse)
        return
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ToolchainError(
            f"{file} cannot be read: {error.strerror}", hint="check its permissions", code="TC-521"
        ) from error
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
            yield parse(_json(line, f"{file}:{number}"), f"{file}:{number}")


def _read_parquet(file: Path, parse: Callable[[Any, str], Any]) -> Iterator[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield parse(row, f"{file} row {number}")
                    number += 1
    except pyarrow.ArrowException as error:
        raise ToolchainError(
            f"{file} is not a Parquet file that can be read: {error}", hint="fetch it again", code="TC-521"
        ) from error


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise bad_record(where, f"not JSON: {error}") from error


TEXT_KEYS = ("text", "article", "prompt", "content")
"""Fields that hold the text of a record, in the order in which they are tried."""


def sample_of(value: Any, where: str) -> Sample:
    """The text or conversation of one record; ToolchainError TC-521 names ``where`` it stands."""
    for key in TEXT_KEYS:
        if isinstance(value, dict) and isinstance(value.get(key), str):
            return str(value[key])
    if isinstance(value, dict) and _is_conversation(value.get("messages")):
        return [{"role": item["role"], "content": item["content"]} for item in value["messages"]]
    raise bad_record(
        where, 'expected an object with "text" (a string) or "messages" (role and content, strings)'
    )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in value
    )


def bad_record(where: str, problem: str) -> ToolchainError:
    """The error about one record, and what to do about it."""
    return ToolchainError(f"{where}: {problem}", hint="mend or remove the line", code="TC-521")
