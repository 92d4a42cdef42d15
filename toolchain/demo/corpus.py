"""The text that is on every machine: the source of the running interpreter's standard library, split by file."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from toolchain.core.errors import ToolchainError

HELD_OUT_PERCENT = 8
LEFT_OUT = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "pydoc_data",
    "__pycache__",
)
"""Folders of tables rather than source (encodings), or not part of every installation."""


@dataclass(frozen=True)
class Corpus:
    train: list[str]
    held_out: list[str]


def read_corpus() -> Corpus:
    """Whole files, in path order. Which are held out depends on the file's relative path alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in LEFT_OUT for part in relative.parts[:-1]):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        (held_out if digest[0] * 100 < HELD_OUT_PERCENT * 256 else train).append(text)
    if not train or not held_out:
        raise ToolchainError(
            f"no standard library source under {root} ({len(train)} files to train on, {len(held_out)} held out)",
            hint="the demo needs a Python installed with its .py files",
            code="TC-006",
        )
    return Corpus(train=train, held_out=held_out)
