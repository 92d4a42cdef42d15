"""Where in config.pbtxt a field stands: protobuf's parser keeps no positions of what it accepts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""#[^\n]*|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|[{}<>\[\]:,;]|[^\s{}<>\[\]:,;"'#]+""", re.DOTALL
)
CLOSING = ("}", ">", "]")
MAX_DEPTH = 100
"""protobuf's own limit of nesting."""


@dataclass
class Node:
    """A field's value: its place (from 1, like protobuf's), and the fields of a message or the text of a scalar."""

    line: int
    column: int
    fields: dict[str, list[Node]] = field(default_factory=dict)
    value: str = ""

    @property
    def place(self) -> str:
        return f"{self.line}:{self.column}"

    def find(self, *path: str | int) -> Node:
        """The node at ``path`` (field names, each followed by an index where it is repeated; 0 otherwise); the
        deepest one that is there, for a field that is not."""
        node = self
        steps = list(path)
        while steps:
            name = steps.pop(0)
            index = steps.pop(0) if steps and isinstance(steps[0], int) else 0
            found = node.fields.get(str(name), [])
            if not isinstance(index, int) or index >= len(found):
                return node
            node = found[index]
        return node

    def entry(self, name: str, key: str) -> Node:
        """The entry of map ``name`` with ``key``; the last one, as in protobuf."""
        for node in reversed(self.fields.get(name, [])):
            if node.find("key").value.strip("\"'") == key:
                return node
        return self


@dataclass(frozen=True)
class Word:
    text: str
    line: int
    column: int


def words(text: str) -> list[Word]:
    """The tokens of a text-format file, comments left out."""
    found, line, start = [], 1, 0
    for match in TOKEN.finditer(text):
        line += text.count("\n", start, match.start())
        start = match.start()
        if not match.group().startswith("#"):
            column = match.start() - (text.rfind("\n", 0, match.start()) + 1) + 1
            found.append(Word(match.group(), line, column))
    return found


def read_places(tokens: list[Word]) -> Node:
    """The tree of a file that protobuf has accepted; of another one, as far as it goes."""
    root = Node(line=1, column=1)
    _message(tokens, 0, root, 0)
    return root


def _message(tokens: list[Word], at: int, node: Node, depth: int) -> int:
    """Read fields into ``node`` from ``tokens[at]`` on; the index behind the closing bracket."""
    while at < len(tokens) and depth < MAX_DEPTH:
        word = tokens[at]
        if word.text in CLOSING:
            return at + 1
        at += 1
        if word.text in (",", ";", ":"):
            continue
        if at < len(tokens) and tokens[at].text == ":":
            at += 1
        values = node.fields.setdefault(word.text, [])
        if at < len(tokens) and tokens[at].text == "[":
            at = _list(tokens, at + 1, values, depth + 1)
        else:
            at = _value(tokens, at, values, word, depth)
    return at


def _list(tokens: list[Word], at: int, values: list[Node], depth: int) -> int:
    while at < len(tokens) and tokens[at].text != "]":
        if tokens[at].text in (",", ";"):
            at += 1
        else:
            at = _value(tokens, at, values, tokens[at], depth)
    return at + 1


def _value(tokens: list[Word], at: int, values: list[Node], start: Word, depth: int) -> int:
    """One message or scalar; its place is that of ``start``, the field's name or the element of the list."""
    node = Node(line=start.line, column=start.column)
    values.append(node)
    if at >= len(tokens):
        return at
    if tokens[at].text in ("{", "<"):
        return _message(tokens, at + 1, node, depth + 1)
    node.value = tokens[at].text
    at += 1
    if node.value == "-" and at < len(tokens):
        node.value, at = f"-{tokens[at].text}", at + 1
    while node.value[:1] in ("'", '"') and at < len(tokens) and tokens[at].text[:1] in ("'", '"'):
        at += 1  # strings that follow each other are one
    return at
