"""How the unquantized model routes a pool of samples, found layer by layer. A ``Route`` of ``quantize/sampling.py``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from toolchain.core.progress import Progress
from toolchain.modeling.layered import LayeredModel
from toolchain.plan.types import Calibration
from toolchain.quantize.accuracy.layers import Arguments, call_layer
from toolchain.quantize.calibration import CalibrationSet
from toolchain.quantize.coverage import Coverage
from toolchain.quantize.streaming.entrance import enter_all
from toolchain.quantize.streaming.failures import naming
from toolchain.quantize.streaming.hidden import Layout, StoredHidden
from toolchain.quantize.streaming.layer_journal import LayerJournal

STREAM = "pool"


class RoutedLayers:
    """Call it with a pool; what is finished of a pass that was killed is kept in ``journal``."""

    def __init__(
        self,
        whole: Any,
        layered: LayeredModel,
        settings: Calibration,
        journal: LayerJournal,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """``whole``: the structure of the whole model, without weights."""
        self.coverage, self.journal = Coverage(whole), journal
        self._layered, self._settings, self._device, self._progress = layered, settings, device, progress

    def __call__(self, pool: CalibrationSet, whole: bool) -> Coverage:
        """The whole pool in any case: a layer must have seen all before the next begins."""
        batches = pool.batches(self._settings.batch_size)
        records = self.journal.records()
        for record in records:
            for path, counts in record["coverage"].items():
                self.coverage.put(path, torch.tensor(counts, dtype=torch.int32))
        arguments: Arguments = {}
        first = None if records else self.journal.hidden(STREAM, 0)
        layout = enter_all(self._layered, batches, arguments, first)
        todo = range(len(records), len(self._layered))
        for index in self._progress.track(todo, description="route, by layer", total=len(todo)):
            self._route(index, pool.tokens.shape[1], layout, arguments)
        return self.coverage

    def _route(self, index: int, length: int, layout: Layout, arguments: Arguments) -> None:
        path = f"{self._layered.prefix}.{index}"
        self.journal.require_hidden(index, [STREAM])
        with naming(index, path), self._layered.layer(index) as layer:
            hidden = StoredHidden(
                self.journal.hidden(STREAM, index),
                self.journal.hidden(STREAM, index + 1),
                layout,
                self._device,
            )
            with self.coverage.counting(length, f"{path}."):
                hidden.advance(partial(call_layer, layer, arguments=arguments, index=index))
        self.journal.commit(index, {"coverage": coverage_json(self.coverage, f"{path}.")}, [STREAM])


def coverage_json(coverage: Coverage, inside: str) -> dict[str, list[list[int]]]:
    """[samples, experts] of every experts module below ``inside``."""
    return {path: coverage.by_sample(path).tolist() for path in coverage.experts if path.startswith(inside)}
