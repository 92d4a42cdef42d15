"""Where each tensor's bytes stand in the files: for readers that want bytes and no tensor library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from toolchain.models.types import TensorInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    file: str
    """Shard, relative to the checkpoint."""
    start: int
    """Offset of the first byte in the file."""
    size: int
    """Bytes."""


def places(directory: Path, infos: Iterable[TensorInfo]) -> dict[str, Place]:
    """Tensor name -> its place. ``infos`` must be validated headers: file by file in order of offset, without holes
    (``toolchain.models.headers``), so that sizes add up to offsets."""
    found: dict[str, Place] = {}
    ends: dict[str, int] = {}
    for info in infos:
        if info.file not in ends:
            with (directory / info.file).open("rb") as handle:
                ends[info.file] = 8 + int.from_bytes(handle.read(8), "little")
        found[info.name] = Place(file=info.file, start=ends[info.file], size=info.bytes)
        ends[info.file] += info.bytes
    return found
