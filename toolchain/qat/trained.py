"""A trained student -> a plain Hugging Face directory in the layout and dtype of its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.qat.student import Student


def settle(student: Student) -> None:
    """Round the student's weights to what ``write_trained`` stores, in place; twice is once."""
    raise NotImplementedError


def write_trained(student: Student, directory: Path, record: dict[str, Any], *, force: bool = False) -> None:
    """Settle the student and write it to ``directory``, complete or absent."""
    raise NotImplementedError
