"""Names without the places where files lay: those are nobody's business, and say nothing on another machine."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def bare(source: Any) -> str:
    """A text, several joined by commas, or a list of them: absolute paths cut to names, names on the hub kept."""
    if source is None:
        return ""
    items = source.split(", ") if isinstance(source, str) else source
    return ", ".join(Path(item).name if Path(item).is_absolute() else str(item) for item in items)


def bare_command(words: Iterable[str]) -> str:
    """A command line, without directories."""
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)
