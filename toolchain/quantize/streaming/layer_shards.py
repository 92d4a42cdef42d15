"""The shards of a checkpoint that is made layer by layer: a layer's tensors go where they belong, in any shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from toolchain.checkpoint.shard_file import ShardFile
from toolchain.core.errors import ToolchainError
from toolchain.core.files import sha256_file
from toolchain.core.progress import Progress
from toolchain.plan.types import SOURCE_DTYPE
from toolchain.quantize.export import Exporter
from toolchain.quantize.streaming.datafree import Source
from toolchain.quantize.streaming.journal import Journal
from toolchain.quantize.streaming.layer_journal import LayerJournal, bytes_digest, names_in
from toolchain.quantize.streaming.layer_pieces import LayerPieces
from toolchain.quantize.streaming.outline import Item, Shard
from toolchain.quantize.streaming.pack import Packer
from toolchain.quantize.streaming.rows import TORCH_DTYPES


class LayerShards:
    """Steps are numbered: one per decoder layer, then one for all that lies around them."""

    def __init__(
        self,
        source: Source,
        packer: Packer,
        journal: Journal,
        records: LayerJournal,
        steps: list[list[Item]],
        pieces: LayerPieces | None = None,
    ) -> None:
        """``steps``: the items of each. ``pieces``: who packs what need not be packed here."""
        self._pieces = pieces
        self._source, self._packer, self._journal, self.records = source, packer, journal, records
        self.steps = steps
        self._files: dict[str, ShardFile] = {}
        self._names = [names_in(source.outline.shards, items) for items in steps]

    def missing_bytes(self) -> int:
        """Bytes for which there is no file yet."""
        return sum(_bytes(shard) for shard in self._source.outline.shards if not self._path(shard).is_file())

    def left_bytes(self) -> int:
        """Bytes of the steps that are not finished."""
        return sum(item.bytes for items in self.steps[len(self.records.records()) :] for item in items)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """All shards open, each of its full size. ToolchainError TC-233 when what was finished is not what is there."""
        try:
            for shard in self._source.outline.shards:
                self._files[shard.file] = _open(self._path(shard), shard)
            for names, record in zip(self._names, self.records.records(), strict=False):
                self.records.require_bytes(self._files, record["digests"], names)
            yield
        finally:
            for file in self._files.values():
                file.abandon()
            self._files.clear()

    def write(self, step: int, exporter: Exporter | None) -> dict[str, str]:
        """All tensors of ``step``, on the disk when this returns; shard -> digest of its part. ``exporter`` None: every
        item is kept as it is in the source."""
        elsewhere: set[str] = set()
        made: Iterable[ShardFile] = ()
        if self._pieces is not None and exporter is not None:
            elsewhere, made = self._pieces.begin(self.steps[step], exporter)
        for item in self.steps[step]:
            if item.name not in elsewhere:
                self._write_item(item, exporter)
        for piece in made:
            self._merge(piece)
        for file in self._names[step]:
            self._files[file].flush()
        return {file: bytes_digest(self._files[file], names) for file, names in self._names[step].items()}

    def _write_item(self, item: Item, exporter: Exporter | None) -> None:
        left = {spec.name for spec in item.outputs}
        made = exporter.made(item.name) if exporter else None
        if made is None and item.format != SOURCE_DTYPE:
            raise ToolchainError(f"{item.name} was planned as {item.format} and is kept", code="TC-235")
        if made is None:
            for file in self._files.values():
                if item.name in file.specs:
                    self._packer.write(item, file)
            left.discard(item.name)
        scales = list(exporter.kv_scale(item.name)) if exporter else []
        for name, tensor in [*(made or []), *scales]:
            if name not in left:
                raise ToolchainError(f"{item.name} became {name}, which was not planned", code="TC-235")
            self._put(name, tensor)
            left.discard(name)
        if left:
            raise ToolchainError(f"{item.name} did not become {sorted(left)}", code="TC-235")

    def _merge(self, piece: ShardFile) -> None:
        """Tensors that were packed elsewhere, into the shards."""
        for name in piece.specs:
            file, offset = next(file for file in self._files.values() if name in file.specs), 0
            for part in piece.read(name):
                file.put_bytes(name, part, offset=offset)
                offset += len(part)

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        file = next(file for file in self._files.values() if name in file.specs)
        spec = file.specs[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
            raise ToolchainError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, planned were {spec.shape} {spec.dtype}",
                code="TC-235",
            )
        file.put(name, tensor)

    def seal(self, progress: Progress) -> dict[str, str]:
        """Every step is finished: give the shards their names; file -> hash."""
        hashes = {}
        shards = self._source.outline.shards
        for shard in progress.track(shards, description="hash shards", total=len(shards)):
            path = self._path(shard)
            hashes[shard.file] = sha256_file(path)
            if path != self._final(shard):
                self._journal.finish(shard.file, hashes[shard.file])
        return hashes

    def _final(self, shard: Shard) -> Path:
        return self._journal.content / shard.file

    def _path(self, shard: Shard) -> Path:
        final = self._final(shard)
        return final if final.is_file() else self._journal.partial(shard.file)


def _bytes(shard: Shard) -> int:
    return sum(spec.bytes for spec in shard.outputs)


def _open(path: Path, shard: Shard) -> ShardFile:
    if path.is_file():
        try:
            return ShardFile(path, shard.outputs, reopen=True)
        except ValueError:  # killed before it had its size
            pass
    return ShardFile(path, shard.outputs)
