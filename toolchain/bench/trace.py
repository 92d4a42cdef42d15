"""Recorded traffic: who asked when, for how long a prompt and how long an answer.

Read are JSON lines and CSV. Keys as published: Mooncake's traces {"timestamp": ms, "input_length", "output_length",
"hash_ids"}; data sets of prompts {"prompt" or "text_input" or "text"} and ShareGPT's {"conversations": [{"from",
"value"}]}; Azure's CSV ``TIMESTAMP,ContextTokens,GeneratedTokens`` (dates); BurstGPT's CSV ``Timestamp,Model,Request
tokens,Response tokens,...`` (seconds).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError

CODE = "TC-708"
PROMPTS = ("prompt", "text_input", "input_text", "text")
INPUTS = ("input_length", "ContextTokens", "Request tokens", "prompt_tokens")
OUTPUTS = ("output_length", "GeneratedTokens", "Response tokens", "output_tokens")
SECONDS = {"timestamp": 1e-3, "TIMESTAMP": None, "Timestamp": 1.0, "timestamp_s": 1.0}
"""Key of the time -> seconds of its unit; None: a date."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One request. What the trace does not say is None."""

    at_s: float | None = None
    """From the first request of the trace."""
    prompt: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None


def read_trace(path: Path, *, limit: int = 0) -> tuple[Entry, ...]:
    """The requests in the first ``limit`` lines of ``path`` (0: all), in the order of their times.

    UsageError TC-708 with the line of what cannot be read. ``hash_ids`` (which prompts begin alike) are not replayed.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _csv(file, path) if path.suffix.lower() == ".csv" else _json_lines(file, path)
            entries: list[Entry] = []
            for number, row in rows:
                entries.append(_entry(row, path, number))
                if len(entries) == limit:
                    break  # published traces have millions of lines
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", code=CODE) from error
    if not entries:
        raise UsageError(f"{path} holds no request", code=CODE)
    times = [entry.at_s for entry in entries if entry.at_s is not None]
    if times and len(times) < len(entries):
        raise UsageError(
            f"{path}: {len(entries) - len(times)} of {len(entries)} requests have no time, the others have one",
            code=CODE,
        )
    if times:
        first = min(times)
        entries = [
            Entry(**{**vars(entry), "at_s": entry.at_s - first})
            for entry in sorted(entries, key=lambda entry: entry.at_s or 0.0)
            if entry.at_s is not None
        ]
    return tuple(entries)


def _json_lines(file: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise _bad(path, number, f"no JSON ({error})") from error
        if not isinstance(value, dict):
            raise _bad(path, number, f"a {type(value).__name__}, expected an object")
        yield number, value


def _csv(file: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file)
    for row in reader:
        yield reader.line_num, {key: value for key, value in row.items() if key is not None}


def _entry(row: dict[str, Any], path: Path, number: int) -> Entry:
    prompt = next((row[key] for key in PROMPTS if isinstance(row.get(key), str)), None)
    output = _tokens(row, OUTPUTS, path, number)
    if prompt is None and isinstance(row.get("conversations"), list):
        prompt = _first_turn(row["conversations"])
    length = _tokens(row, INPUTS, path, number)
    if not prompt and length is None:
        keys = ", ".join(sorted(row)[:8]) or "nothing"
        raise _bad(
            path, number, f"neither a prompt nor its length in {keys}; expected prompt or input_length"
        )
    return Entry(
        at_s=_time(row, path, number),
        prompt=prompt or None,
        prompt_tokens=None if prompt else length,
        output_tokens=output,
    )


def _first_turn(turns: list[Any]) -> str | None:
    """What the human says first."""
    for turn in turns:
        if (
            isinstance(turn, dict)
            and turn.get("from") in ("human", "user")
            and isinstance(turn.get("value"), str)
        ):
            return str(turn["value"])
    return None


def _tokens(row: dict[str, Any], keys: tuple[str, ...], path: Path, number: int) -> int | None:
    for key in keys:
        if row.get(key) not in (None, ""):
            try:
                value = int(row[key])
            except (TypeError, ValueError) as error:
                raise _bad(path, number, f"{key} {row[key]!r}, expected a whole number") from error
            if value < 0:
                raise _bad(path, number, f"{key} {value}, expected >= 0")
            return max(1, value)  # Azure has answers of no token; a request for none cannot be sent
    return None


def _time(row: dict[str, Any], path: Path, number: int) -> float | None:
    for key, unit in SECONDS.items():
        value = row.get(key)
        if value in (None, ""):
            continue
        try:
            if unit is None:
                date = datetime.fromisoformat(str(value))
                return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
            seconds = float(str(value)) * unit
        except ValueError as error:
            raise _bad(
                path, number, f"{key} {value!r}, expected a {'date' if unit is None else 'number'}"
            ) from error
        if not math.isfinite(seconds):
            raise _bad(path, number, f"{key} {value!r}, expected a finite number")
        return seconds
    return None


def _bad(path: Path, number: int, what: str) -> UsageError:
    return UsageError(f"{path} line {number}: {what}", code=CODE)
