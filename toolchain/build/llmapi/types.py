"""Types of the LLM API's arguments as ``data/args_*.yaml`` write them, and whether a YAML value fits.

``bool``, ``int``, ``float``, ``str``, ``any``; ``PositiveInt``, ``NonNegativeInt``, ``NonNegativeFloat`` and
``Fraction`` (0 to 1); ``object``, a Python object that no YAML file can hold; ``<A B>``, one of these words;
``list[X]``; ``dict[K, V]``; ``X | Y``; ``X?``, X or null; every other name is a class or a union of the record.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_TOKEN = re.compile(r"\s*(<[^>]*>|[A-Za-z_]\w*|[\[\],?|])")


@dataclass(frozen=True, kw_only=True)
class Type:
    """A type as a tree."""

    name: str
    """An atom of the module's docstring, ``list``, ``dict``, ``union``, ``words``, ``null``, or a class."""
    parts: tuple[Type, ...] = ()
    """Members of a union, the item of a list, key and value of a dict."""
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        inner = [str(part) for part in self.parts]
        if self.name == "words":
            return f"one of {', '.join(self.words)}"
        if self.name == "union":
            return " or ".join(inner)
        if self.name == "list":
            return f"a list of ({inner[0]})"
        if self.name == "dict":
            return f"a mapping of ({inner[0]}) to ({inner[1]})"
        return SAID.get(self.name, f"a mapping of {self.name}")


@lru_cache(maxsize=1024)
def parse_type(text: str) -> Type:
    """The tree of ``text``. ValueError for what is no type: a defect of the data."""
    tokens = _TOKEN.findall(text)
    if "".join(tokens).replace(" ", "") != text.replace(" ", ""):
        raise ValueError(f"{text!r} is not a type")
    found, rest = _union(tokens)
    if rest:
        raise ValueError(f"{text!r} is not a type: {rest[0]!r} is left")
    return found


def _union(tokens: list[str]) -> tuple[Type, list[str]]:
    first, tokens = _term(tokens)
    members = [first]
    while tokens and tokens[0] == "|":
        member, tokens = _term(tokens[1:])
        members.append(member)
    return (members[0] if len(members) == 1 else Type(name="union", parts=tuple(members))), tokens


def _term(tokens: list[str]) -> tuple[Type, list[str]]:
    head, tokens = tokens[0], tokens[1:]
    if head.startswith("<"):
        found = Type(name="words", words=tuple(head[1:-1].split()))
    elif tokens and tokens[0] == "[":
        parts: list[Type] = []
        while tokens[0] != "]":
            part, tokens = _union(tokens[1:])
            parts.append(part)
        found, tokens = Type(name=head, parts=tuple(parts)), tokens[1:]
    else:
        found = Type(name=head)
    if tokens and tokens[0] == "?":
        return Type(name="union", parts=(found, Type(name="null"))), tokens[1:]
    return found, tokens


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    """Python takes True for 1; 4.0 is what JSON may make of 4, and pydantic takes it too."""
    return _number(value) and float(value).is_integer()


ATOMS: dict[str, Callable[[Any], bool]] = {
    "any": lambda value: True,
    "null": lambda value: value is None,
    "object": lambda value: False,
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "int": _whole,
    "float": _number,
    "PositiveInt": lambda value: _whole(value) and value > 0,
    "NonNegativeInt": lambda value: _whole(value) and value >= 0,
    "NonNegativeFloat": lambda value: _number(value) and value >= 0,
    "Fraction": lambda value: _number(value) and 0 <= value <= 1,
}

SAID = {
    "null": "null",
    "object": "a Python object, which no file can hold",
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number of at least 0",
    "NonNegativeFloat": "a number of at least 0",
    "Fraction": "a number from 0 to 1",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
}
"""How an atom is called in a message."""
