"""The recorded arguments of ``LlmArgs`` by release: ``data/args_<release>.yaml``, made with ``extract.py`` or read from
the documentation; each says where it was read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from toolchain.build.llmapi.types import Type, parse_type
from toolchain.targets.version import Version, parse_version

DATA = Path(__file__).parent / "data"
ROOT = "TorchLlmArgs"
"""The class of ``LLM()``'s own arguments with the PyTorch backend."""
_CLASS = re.compile(r"(\w+)(?:\((\w+)\))?\Z")


@dataclass(frozen=True, kw_only=True)
class Argument:
    type: Type
    default: str | None
    """JSON as recorded; None where the record has none: it is required, or made by the class."""


@dataclass(frozen=True, kw_only=True)
class Union:
    """Classes told apart by the value of one key."""

    by: str
    classes: dict[str, str]
    """Value of ``by`` -> class, or ``any`` for one whose keys are not recorded."""


@dataclass(frozen=True, kw_only=True)
class Record:
    since: str
    """First release that it is used for."""
    releases: tuple[str, ...]
    """Releases whose own sources or documentation were read; none where it was only a state of main."""
    read_from: str
    source: str
    classes: dict[str, dict[str, Argument]]
    unions: dict[str, Union]
    unread: frozenset[str]
    """Classes that were not read in this release itself: what they lack may be missing in the record only."""

    @property
    def version(self) -> Version:
        return parse_version(self.since)

    def known(self, class_name: str) -> bool:
        """Whether the record has all keys of a class."""
        return class_name not in self.unread


@lru_cache(maxsize=1)
def read_records() -> tuple[Record, ...]:
    """All records, oldest first."""
    import yaml

    raw = {}
    for path in sorted(DATA.glob("args_*.yaml")):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        raw[str(found["since"])] = found
    return tuple(sorted((record_of(raw, since) for since in raw), key=lambda record: record.version))


def find_record(version: str) -> Record:
    """The record of a release or of the nearest older one; the oldest for what is older than all."""
    records = read_records()
    wanted = parse_version(version)
    return next((record for record in reversed(records) if record.version <= wanted), records[0])


def is_newer(version: str) -> bool:
    """Whether a release is of a later line than everything that was recorded."""
    return parse_version(version).key[:3] > read_records()[-1].version.key[:3]


def record_of(raw: dict[str, Any], since: str) -> Record:
    """The record of ``since`` among documents by release, with what it takes from the one that it differs from."""
    found = raw[since]
    unread = frozenset(found.get("unread", ()))
    classes, unions, bases = _merged(raw, since)
    whole = {name: {**_inherited(classes, bases, name)} for name in classes}
    return Record(
        since=since,
        releases=tuple(str(item) for item in found.get("releases", ())),
        read_from=str(found["read_from"]),
        source=" ".join(str(found["source"]).split()),
        classes={name: {key: _argument(text) for key, text in keys.items()} for name, keys in whole.items()},
        unions={
            name: Union(by=item["by"], classes={str(key): value for key, value in item["classes"].items()})
            for name, item in unions.items()
        },
        unread=unread,
    )


def _merged(
    raw: dict[str, Any], since: str
) -> tuple[dict[str, dict[str, str]], dict[str, Any], dict[str, str]]:
    """(class -> key -> text, unions, class -> base) of a record on top of the one that it differs from."""
    found = raw[since]
    classes: dict[str, dict[str, str]] = {}
    unions: dict[str, Any] = {}
    bases: dict[str, str] = {}
    if found.get("differs_from"):
        older, unions, bases = _merged(raw, str(found["differs_from"]))
        gone = {name: set(keys) for name, keys in found.get("remove", {}).items()}
        classes = {
            name: {key: text for key, text in keys.items() if key not in gone.get(name, ())}
            for name, keys in older.items()
        }
    for head, keys in found["classes"].items():
        match = _CLASS.match(head)
        if match is None:
            raise ValueError(f"{head!r} is no class")
        name, base = match.groups()
        if base:
            bases = {**bases, name: base}
        classes[name] = {**classes.get(name, {}), **keys}
    return classes, {**unions, **found.get("unions", {})}, bases


def _inherited(classes: dict[str, dict[str, str]], bases: dict[str, str], name: str) -> dict[str, str]:
    base = _inherited(classes, bases, bases[name]) if name in bases else {}
    return {**base, **classes[name]}


def _argument(text: str) -> Argument:
    kind, _, default = text.partition(" = ")
    return Argument(type=parse_type(kind), default=default or None)
