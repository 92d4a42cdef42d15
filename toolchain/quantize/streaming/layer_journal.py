"""What is finished of a checkpoint that is made layer by layer: the bytes in its shards, and the next layer's inputs.

In the journal's directory (``journal.py``), under ``layers/``: ``<kind>-<layer>.json`` for each finished layer,
``<stream>-<layer>`` for the hidden states in front of a layer, ``chosen.json`` for the samples that were chosen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolchain.checkpoint.shard_file import ShardFile
from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json, read_json
from toolchain.quantize.streaming.hidden import digest
from toolchain.quantize.streaming.journal import Journal
from toolchain.quantize.streaming.outline import Item, Shard

CHOSEN = "chosen.json"


class LayerJournal:
    """Records of one run of ``kind``: ``route`` or ``quantize``."""

    def __init__(self, journal: Journal, kind: str) -> None:
        self.journal, self.kind = journal, kind
        self.directory = journal.layers

    def records(self) -> list[dict[str, Any]]:
        """Of the layers that are finished, from the first on."""
        found: list[dict[str, Any]] = []
        while (path := self._record(len(found))).is_file():
            found.append(read_json(path))
        return found

    def hidden(self, stream: str, layer: int) -> Path:
        """Where the hidden states in front of ``layer`` are."""
        return self.directory / f"{self.kind}-{stream}-{layer}"

    def commit(self, layer: int, record: dict[str, Any], streams: Iterable[str]) -> None:
        """Layer ``layer`` is finished: its bytes, and the inputs of the next, are on the disk. Its own are dropped."""
        following = {stream: self.hidden(stream, layer + 1) for stream in streams}
        digests = {stream: digest(path) for stream, path in following.items() if path.is_file()}
        atomic_write_json(self._record(layer), {**record, "hidden": digests})
        for stream in following:
            self.hidden(stream, layer).unlink(missing_ok=True)

    def require_hidden(self, layer: int, streams: Iterable[str]) -> None:
        """ToolchainError TC-233 when the inputs of ``layer`` are not those that the layer before it left."""
        if layer == 0:
            return
        expected = read_json(self._record(layer - 1))["hidden"]
        for stream in streams:
            path = self.hidden(stream, layer)
            if not path.is_file() or digest(path) != expected.get(stream):
                raise self._changed(path)

    def require_bytes(self, files: dict[str, ShardFile], digests: dict[str, str], names: Names) -> None:
        """ToolchainError TC-233 when a finished layer's bytes in a shard are not those that were recorded."""
        for file, expected in digests.items():
            if bytes_digest(files[file], names[file]) != expected:
                raise self._changed(files[file].path)

    def forget(self) -> None:
        """Drop everything of this kind."""
        for path in self.directory.glob(f"{self.kind}-*"):
            path.unlink()

    def _changed(self, path: Path) -> ToolchainError:
        return ToolchainError(
            f"{path} is not what was written there before the run ended",
            hint=f"layers build on each other: remove {self.journal.root} to begin anew",
            code="TC-233",
        )

    def _record(self, layer: int) -> Path:
        return self.directory / f"{self.kind}-{layer}.json"


Names = dict[str, list[str]]
"""Shard file -> tensors in it."""


def names_in(shards: Iterable[Shard], items: Iterable[Item]) -> Names:
    """The tensors of ``items``, by the shard that holds them."""
    wanted = {spec.name for item in items for spec in item.outputs}
    found = {shard.file: [spec.name for spec in shard.outputs if spec.name in wanted] for shard in shards}
    return {file: names for file, names in found.items() if names}


def bytes_digest(file: ShardFile, names: Iterable[str]) -> str:
    """SHA-256 over the bytes of some tensors, one after the other."""
    total = hashlib.sha256()
    for name in names:
        for part in file.read(name):
            total.update(part)
    return total.hexdigest()
