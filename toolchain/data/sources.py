"""Where samples come from: a local path, or a data set on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from toolchain.core.errors import UsageError
from toolchain.data.hub import read_hub_texts
from toolchain.data.texts import KNOWN_SUFFIXES, Sample, read_texts


def read_source(source: str | Path) -> Iterator[Sample]:
    """Samples of a file, a directory, or a data set on the hub (``owner/name`` or ``owner/name:config``).

    UsageError TC-520 for a path that does not exist.
    """
    path = Path(source).expanduser()
    if path.exists():
        return read_texts(path)
    name = str(source)
    if path.suffix in KNOWN_SUFFIXES or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UsageError(
            f"{source} does not exist",
            hint="give a text, JSONL or Parquet file, a directory of them, or a data set on the hub (owner/name)",
            code="TC-520",
        )
    return read_hub_texts(name)
