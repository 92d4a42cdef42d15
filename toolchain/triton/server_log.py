"""The log of a tritonserver, without what nobody looks for in it."""

from __future__ import annotations

import re
from pathlib import Path

TAIL_LINES = 30
WIDTH = 400
NOISE = re.compile(r"[+|]|I\d{4} ")
"""Tables of options, and lines of level INFO."""


def log_end(path: Path, lines: int = TAIL_LINES) -> str:
    """The last telling lines: warnings, errors, the engine's own; with a heading."""
    text = path.read_text(encoding="utf-8", errors="replace")
    telling = [line for line in text.splitlines() if line.strip() and not NOISE.match(line)]
    return "\n".join([f"the end of {path}:", *(line[:WIDTH] for line in telling[-lines:])])
