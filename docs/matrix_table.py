"""The README's table of formats and KV caches x models, made from docs/matrix.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from toolchain.families import FAMILIES
from toolchain.formats import FORMATS, KV_CACHES

RECORD = Path(__file__).resolve().parent / "matrix.json"
Row = dict[str, Any]


def matrix() -> str:
    """The table with its footnotes. ValueError when the record lacks a format, a KV cache or a family."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    _require_complete(record)
    notes = Footnotes()
    plain = [row for row in record["cells"] if row["kv_cache"] == "none"]
    cached = [row for row in record["cells"] if row["kv_cache"] != "none"]
    used = sorted({row["format"] for row in cached})
    models = list(record["models"])
    formats, caches = [item.name for item in FORMATS], [name for name in KV_CACHES if name != "none"]
    refused = sum(bool(row["refused"]) for row in record["cells"])
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    return "\n".join(
        [
            f"| | {' | '.join(models)} |",
            f"|---|{'---|' * len(models)}",
            *_lines(formats, models, plain, "format", notes.cell),
            *_lines(caches, models, cached, "kv_cache", notes.cell),
            "",
            *notes.lines(),
            "",
            f"{len(record['cells']) - refused} of {len(record['cells'])} cells run, {refused} are refused; {versions}. "
            f"The KV caches were run with {' and '.join(used)}.",
        ]
    )


def _require_complete(record: Row) -> None:
    found = {
        "format": {row["format"] for row in record["cells"]},
        "KV cache": {row["kv_cache"] for row in record["cells"]},
        "family": {about["family"] for about in record["models"].values()},
    }
    wanted = {
        "format": {item.name for item in FORMATS},
        "KV cache": set(KV_CACHES),
        "family": {item.name for item in FAMILIES},
    }
    for noun, names in wanted.items():
        if names != found[noun]:
            differ = ", ".join(sorted(names ^ found[noun]))
            raise ValueError(f"{RECORD.name} and the code differ in {noun} {differ}: run `make test-matrix`")


def _lines(
    names: list[str], models: list[str], rows: list[Row], key: str, cell: Callable[[Iterable[Row]], str]
) -> Iterator[str]:
    for name in names:
        cells = (cell(row for row in rows if row[key] == name and row["model"] == model) for model in models)
        yield f"| {'KV cache ' if key == 'kv_cache' else ''}{name} | {' | '.join(cells)} |"


class Footnotes:
    """Reasons of refusal, numbered as they are met; a format or cache that a message names is left out of it."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def cell(self, rows: Iterable[Row]) -> str:
        """``ok``, the footnotes of the refusal, or which policy is refused."""
        found: dict[str, list[str]] = {}
        for row in rows:
            numbers = "".join(f"[{self._number(row, item)}]" for item in row["refused"])
            found.setdefault(numbers or "ok", []).append(row["policy"])
        if not found:
            raise ValueError(f"{RECORD.name} lacks a cell: run `make test-matrix`")
        if len(found) == 1:
            return next(iter(found))
        return ", ".join(
            word if word == "ok" else f"{'/'.join(policies)} {word}" for word, policies in found.items()
        )

    def _number(self, row: Row, item: dict[str, str]) -> int:
        text = item["message"].replace(f"as {row['format']} for", "in this format for")
        text = text.replace(f"an {row['kv_cache']} cache", "this cache")
        return self._numbers.setdefault(f"{item['code']}: {text}", len(self._numbers) + 1)

    def lines(self) -> Iterator[str]:
        for text, number in self._numbers.items():
            yield f"{number}. {text}."
