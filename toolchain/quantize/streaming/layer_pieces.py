"""Which tensors of a calibrated layer may be packed elsewhere, and how they come back.

Those that follow from the source and the ranges: where a recipe chose codes or changed weights, the numbers are in the
memory of the process that calibrated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from toolchain.checkpoint.shard_file import ShardFile
from toolchain.formats import get_format
from toolchain.plan.types import SOURCE_DTYPE
from toolchain.quantize import scales
from toolchain.quantize.export import Exporter
from toolchain.quantize.streaming.datafree import Source
from toolchain.quantize.streaming.executor import PackJob, Pieces
from toolchain.quantize.streaming.outline import Item
from toolchain.recipes import get_recipe

JOB_BYTES = 64 << 20
"""Of packed tensors in one job: enough to outweigh its start, little enough to spread a layer of 256 experts."""


class LayerPieces:
    """The parts of layers of ``source`` that ``pieces`` packs."""

    def __init__(self, pieces: Pieces, source: Source) -> None:
        self._pieces, self._source = pieces, source
        self._recipe = get_recipe(source.plan.recipe, get_format(source.plan.format))

    def begin(self, items: Iterable[Item], exporter: Exporter) -> tuple[set[str], Iterator[ShardFile]]:
        """(names of the items that are packed elsewhere, files with what becomes of them, as they are finished)."""
        elsewhere = {item.name: item for item in items if self._may(item, exporter)}
        jobs = []
        for part in _parts(elsewhere.values()):
            amax = {item.module: _input_amax(item.module, item.format, exporter) for item in part}
            jobs.append(PackJob(names=tuple(item.name for item in part), input_amax=amax))
        return set(elsewhere), _opened(self._pieces.begin(jobs), elsewhere)

    def _may(self, item: Item, exporter: Exporter) -> bool:
        source, modules = self._source, exporter.applied.packed
        if item.format == SOURCE_DTYPE or item.kept_codes or source.family.is_fused(item.module):
            return False
        path = source.family.to_module(item.module)
        return (
            path not in modules
            and not any(self._recipe.for_format(item.format).on(axis) for axis in ("order", "transform"))
            and not source.rows.casts(item.name, item.format)
            and {spec.name for spec in item.outputs} == _plain(item)
        )


def _plain(item: Item) -> set[str]:
    """What a matrix becomes by itself: without channel scales and scales of the KV cache."""
    return {f"{item.module}.{stored.suffix}" for stored in get_format(item.format).stored if stored.required}


def _opened(made: Iterator[tuple[PackJob, Path]], items: dict[str, Item]) -> Iterator[ShardFile]:
    """The files of ``made``, each open until the next is asked for, then gone."""
    for job, path in made:
        file = ShardFile(path, [spec for name in job.names for spec in items[name].outputs], reopen=True)
        try:
            yield file
        finally:
            file.abandon()
            path.unlink()


def _parts(items: Iterable[Item]) -> Iterator[list[Item]]:
    part: list[Item] = []
    for item in items:
        part.append(item)
        if sum(each.bytes for each in part) >= JOB_BYTES:
            yield part
            part = []
    if part:
        yield part


def _input_amax(module: str, format_name: str, exporter: Exporter) -> float | None:
    """TC-202 when no token reached it."""
    path, needed = exporter.family.to_module(module), get_format(format_name).has_input_scale
    found = scales.calibrated(exporter.model.get_submodule(path), path, needs_input=needed)
    return float(found.input_amax) if needed and found.input_amax is not None else None
