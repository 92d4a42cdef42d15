"""A YAML mapping with the line and column of each key, and the keys that it gives twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 50
MAX_NODES = 100_000


@dataclass(frozen=True, kw_only=True)
class Document:
    values: dict[str, Any]
    places: dict[tuple[str, ...], str]
    """Path of keys -> ``:line:column``."""

    def place(self, *path: str) -> str:
        """``:line:column`` of the key at ``path``, or of the deepest one above it; empty for none."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return ""


def read_document(text: str) -> tuple[Document | None, list[tuple[str, str]]]:
    """The document, and (``:line:column``, problem) of what is wrong with it; None where it is no mapping."""
    import yaml

    problems: list[tuple[str, str]] = []
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)  # aliases are shared, not copied: as large as the text
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        return None, [(place, str(getattr(error, "problem", None) or "not valid YAML"))]
    except (ValueError, RecursionError) as error:
        return None, [("", f"not valid YAML: {error}")]
    if not isinstance(values, dict):
        return None, [("", "expected a mapping of LLM() arguments")]
    places: dict[tuple[str, ...], str] = {}
    if not _walk(root, (), places, problems, [MAX_NODES]):
        return None, [("", f"more than {MAX_NODES} nodes, aliases counted where they stand")]
    return Document(values=values, places=places), problems


def _walk(node: Any, path: tuple[str, ...], places: Any, problems: Any, left: list[int]) -> bool:
    """False as soon as there are too many nodes: aliases of aliases may stand for any number of them."""
    import yaml

    left[0] -= 1
    if left[0] < 0 or len(path) > MAX_DEPTH:
        return False
    if isinstance(node, yaml.SequenceNode):
        items = enumerate(node.value)
        return all(_walk(item, (*path, f"{at}]"), places, problems, left) for at, item in items)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        here = (*path, str(key.value))
        place = f":{key.start_mark.line + 1}:{key.start_mark.column + 1}"
        if here in places and here[-1] != "<<":
            problems.append((place, f"{'.'.join(here)} is given twice: YAML takes the last"))
        places[here] = place
        if not _walk(value, here, places, problems, left):
            return False
    return True
