"""Annotations of pydantic fields, as syntax, in the words of ``types.py``."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field

ATOMS = {
    **{name: name for name in ("bool", "int", "float", "str", "object")},
    **{name: name for name in ("PositiveInt", "NonNegativeInt", "NonNegativeFloat")},
    "StrictInt": "int",
    "Any": "any",
    "Path": "str",
    "dict": "dict[str, any]",
    "list": "list[any]",
    "None": "null",
}
LISTS = ("List", "list", "Set", "set", "Sequence", "Tuple", "tuple")


@dataclass(kw_only=True)
class Names:
    """What the module defines."""

    classes: set[str] = field(default_factory=set)
    words: dict[str, list[str]] = field(default_factory=dict)
    """Enum -> its words."""
    aliases: dict[str, ast.expr] = field(default_factory=dict)
    unions: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    """Union -> (its discriminator or nothing, its classes)."""


def type_text(annotation: ast.expr, names: Names, options: dict[str, ast.expr]) -> str:
    """``options``: keyword arguments of the field; a ``type`` that it states wins over a bare ``object``."""
    found = _text(annotation, names)
    stated = _stated(options)
    if "object" in found.replace("?", " ").split() and stated is not None:
        stated_text = _text(stated, names)
        found = stated_text if any(name in stated_text for name in names.classes) else found
    return _bounded(found, options)


def _stated(options: dict[str, ast.expr]) -> ast.expr | None:
    extra = options.get("json_schema_extra")
    if not isinstance(extra, ast.Dict):
        return None
    for key, value in zip(extra.keys, extra.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == "type" and isinstance(value, ast.Constant):
            try:
                return ast.parse(str(value.value), mode="eval").body
            except SyntaxError:
                return None
    return None


def _bounded(text: str, options: dict[str, ast.expr]) -> str:
    """``ge``, ``gt`` and ``le`` of a number."""
    limits = {
        name: options[name].value  # type: ignore[attr-defined]
        for name in ("ge", "gt", "le")
        if isinstance(options.get(name), ast.Constant)
    }
    bare, optional = text.removesuffix("?"), "?" if text.endswith("?") else ""
    if bare == "float" and limits == {"ge": 0, "le": 1}:
        return f"Fraction{optional}"
    if bare == "int" and (limits.get("gt") == 0 or limits.get("ge") == 1):
        return f"PositiveInt{optional}"
    if bare == "int" and limits.get("ge") == 0:
        return f"NonNegativeInt{optional}"
    return text


def _text(node: ast.expr, names: Names) -> str:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):  # a quoted annotation
            return _text(ast.parse(node.value, mode="eval").body, names)
        return "null"
    if isinstance(node, ast.BinOp):
        return _either([_text(node.left, names), _text(node.right, names)])
    if isinstance(node, ast.Subscript):
        return _subscript(node, names)
    name = ast.unparse(node).rpartition(".")[2]
    if name in names.words:
        return f"<{' '.join(names.words[name])}>"
    if name in names.aliases:
        return _text(names.aliases[name], names)
    if name in names.classes or name in names.unions:
        return name
    # A class of another module: a mapping from a file, unless it is something that no file can hold.
    return ATOMS.get(name, "dict[str, any]" if name.endswith("Config") else "object")


def _subscript(node: ast.Subscript, names: Names) -> str:
    head = ast.unparse(node.value).rpartition(".")[2]
    items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if head == "Literal":
        return f"<{' '.join(str(ast.literal_eval(item)) for item in items)}>"
    inner = [_text(item, names) for item in items[: 1 if head == "Annotated" else None]]
    if head == "Annotated":
        return inner[0]
    if head == "Optional":
        return inner[0] if inner[0].endswith(("?", "null")) else _either([inner[0], "null"])
    if head == "Union":
        return _either(inner)
    if head in LISTS:
        return f"list[{inner[0]}]"
    if head in ("Dict", "dict"):
        return f"dict[{', '.join(inner)}]"
    return "any"


def _either(kinds: list[str]) -> str:
    """A union without repeats; ``X?`` for X or null."""
    parts = list(dict.fromkeys(part for kind in kinds for part in _members(kind)))
    if "object" in parts and len(set(parts) - {"null"}) > 1:
        parts.remove("object")
    if len(parts) == 2 and "null" in parts:
        return f"{next(part for part in parts if part != 'null')}?"
    return " | ".join(parts)


def _members(kind: str) -> list[str]:
    return [kind[:-1], "null"] if kind.endswith("?") else kind.split(" | ") if "[" not in kind else [kind]


def default_text(value: ast.expr | None, options: dict[str, ast.expr]) -> str | None:
    """JSON of the default; None for a required field or one that a class makes."""
    made = options.get("default_factory")
    if isinstance(made, ast.Lambda):
        return _json(made.body)
    if made is not None:
        return "{}" if ast.unparse(made) == "dict" else None
    if options or isinstance(value, ast.Call):
        return _json(options.get("default"))
    return _json(value)


def _json(node: ast.expr | None) -> str | None:
    if node is None or (isinstance(node, ast.Constant) and node.value is ...):
        return None
    if isinstance(node, ast.Attribute):  # a member of an enum
        return json.dumps(node.attr)
    value = _number(node)
    if value is not None:
        return json.dumps(value)
    try:
        return json.dumps(ast.literal_eval(node))
    except (ValueError, TypeError):
        return None


def _number(node: ast.expr) -> int | None:
    """``1024**3`` and ``64 * 1024``, which are no literals."""
    if not isinstance(node, ast.BinOp):
        return None
    left, right = (_number(side) if isinstance(side, ast.BinOp) else getattr(side, "value", None)
                   for side in (node.left, node.right))  # fmt: skip
    if not isinstance(left, int) or not isinstance(right, int):
        return None
    return (
        left**right
        if isinstance(node.op, ast.Pow)
        else left * right
        if isinstance(node.op, ast.Mult)
        else None
    )
