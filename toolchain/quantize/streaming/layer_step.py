"""The steps of a run layer by layer: calibrate, choose, write, remember."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from toolchain.core.progress import Progress, Silent
from toolchain.formats import get_format
from toolchain.modeling.decoder import find_decoder_layers
from toolchain.modeling.layered import LayeredModel
from toolchain.models.config import need, read_config, text_config
from toolchain.plan.types import SOURCE_DTYPE
from toolchain.quantize import quantizers, scales
from toolchain.quantize.accuracy import Applied, MakeWalk, apply_recipe, counts_on_walk, walks
from toolchain.quantize.accuracy.layers import Arguments, HeldHidden, LayerWalk, call_layer
from toolchain.quantize.export import Exporter, require_kv_scales
from toolchain.quantize.forward import CalibrationPass
from toolchain.quantize.precast import Precast
from toolchain.quantize.sparsity import sparsify
from toolchain.quantize.streaming.datafree import Source
from toolchain.quantize.streaming.entrance import enter_all
from toolchain.quantize.streaming.failures import naming
from toolchain.quantize.streaming.hidden import Layout, StoredHidden
from toolchain.quantize.streaming.layer_shards import LayerShards
from toolchain.quantize.streaming.outline import Item
from toolchain.quantize.streaming.routing import coverage_json
from toolchain.recipes import get_recipe

OBSERVED, SHIPPED = "observed", "shipped"


def split_steps(source: Source, layered: LayeredModel) -> list[list[Item]]:
    """Items of each decoder layer, then of all that lies around them, in the order of the files."""
    steps: list[list[Item]] = [[] for _ in range(len(layered) + 1)]
    seen: set[str] = set()
    for shard in source.outline.shards:
        for item in shard.items:
            if item.name not in seen:  # one that lies in two shards is in both
                seen.add(item.name)
                layer = layered.layer_of(source.family.to_module(item.module))
                steps[len(layered) if layer is None else layer].append(item)
    return steps


class LayerSteps:
    """``run`` does those that are not finished."""

    def __init__(
        self, source: Source, layered: LayeredModel, forward: CalibrationPass, shards: LayerShards
    ) -> None:
        plan = source.plan
        self._source, self._layered, self._forward, self._shards = source, layered, forward, shards
        self._records = shards.records
        self._recipe = get_recipe(plan.recipe, get_format(plan.format))
        self._walks = walks(self._recipe, _open_formats(source))
        self._observes = quantizers.observes_inputs(plan)
        self._head = any(item.format != SOURCE_DTYPE for item in shards.steps[-1])
        self._arguments: Arguments = {}
        self._layout = Layout(shapes=(), dtype=torch.float32)
        self.details: list[dict[str, Any]] = []
        """What the recipe did, step by step."""

    @property
    def streams(self) -> list[str]:
        """Hidden states that are carried from layer to layer."""
        return [OBSERVED] * self._observes + [SHIPPED] * self._walks

    def hidden_bytes(self) -> int:
        """Of all streams, before and behind a layer."""
        tokens = sum(batch.numel() for batch in self._forward.batches)
        width = need(text_config(read_config(self._source.directory)), "hidden_size")
        return 2 * len(self.streams) * tokens * int(width) * self._layered.dtype.itemsize

    def run(self, done: Callable[[int], None], progress: Progress) -> None:
        """``done`` is called with the bytes of each finished step."""
        finished = self._restore()
        last = len(self._layered)
        if finished:
            progress.note(f"going on: {min(finished, last)} of {last} layers are finished")
        if finished <= last and self.streams:
            self._enter(first=finished == 0)
        for index in range(finished, last):
            self._layer(index, progress)
            done(sum(item.bytes for item in self._shards.steps[index]))
        if finished <= last:
            self._around(progress)
            done(sum(item.bytes for item in self._shards.steps[last]))

    def _restore(self) -> int:
        """How many steps are finished; what they found out is known again."""
        records = self._records.records()
        for record in records:
            self.details.append(record["details"])
            for path, counts in record["coverage"].items():
                self._forward.coverage.put(path, torch.tensor(counts, dtype=torch.int32))
            for path, extra in record["extra"].items():
                self._forward.extra[path] = torch.tensor(extra, dtype=torch.int64)
        return len(records)

    def _enter(self, *, first: bool) -> None:
        paths = [self._records.hidden(stream, 0) for stream in self.streams]
        self._layout = enter_all(
            self._layered, self._forward.batches, self._arguments, paths[0] if first else None
        )
        for other in paths[1:] if first else ():  # both streams begin with the same
            other.unlink(missing_ok=True)
            os.link(paths[0], other)

    def _layer(self, index: int, progress: Progress) -> None:
        path = f"{self._layered.prefix}.{index}"
        self._records.require_hidden(index, self.streams)
        with naming(index, path), self._layered.layer(index) as layer:
            self._announce(index + 1)
            applied = self._quantize(
                self._layered.model,
                partial(self._observe, index, layer) if self._observes else None,
                partial(self._walk, index) if self._walks else None,
                progress,
            )
            exporter = self._exporter(applied)
            require_kv_scales(exporter, self._source.plan, 1)
            digests = self._shards.write(index, exporter)
        self._commit(index, digests, applied, f"{path}.")

    def _announce(self, index: int) -> None:
        """Let the kernel fetch the next layer while this one is worked on; this one's pages are not needed again."""
        rows = self._source.rows
        for item in self._shards.steps[index - 1]:
            for name in rows.stored_names(item.name):
                rows.forget(name)
        for item in self._shards.steps[index] if index < len(self._layered) else ():
            for name in rows.stored_names(item.name):
                rows.announce(name)

    def _around(self, progress: Progress) -> None:
        """Embedding, final norm, output projection, and whatever else the files hold."""
        index, applied = len(self._layered), Applied()
        if not self._head:
            digests = self._shards.write(index, None)
        else:
            self._records.require_hidden(index, [OBSERVED] * self._observes)
            with naming(index, "around the layers"), self._layered.ends(head=True) as model:
                applied = self._quantize(
                    model,
                    partial(self._replay, model) if self._observes else None,
                    partial(self._no_walk, model) if self._walks else None,
                    progress,
                )
                digests = self._shards.write(index, self._exporter(applied, model))
        self._commit(index, digests, applied, "around")

    def _quantize(
        self,
        model: Any,
        observe: Callable[[Any], None] | None,
        make_walk: MakeWalk | None,
        progress: Progress,
    ) -> Applied:
        """As in memory (``job.py``), on the part of the model that is there."""
        plan, family = self._source.plan, self._source.family
        zeros = sparsify(model, plan, family, None, Silent())
        with contextlib.redirect_stdout(io.StringIO()):  # ModelOpt prints; stdout is for data
            modules = quantizers.quantize(model, plan, family, observe)
            scales.share_expert_inputs(model)
            scales.merge_fused(model, quantizers.fused_groups(modules, family))
            precast = Precast(self._source.rows.reader, modules, family)
            applied = apply_recipe(
                model, precast.rest(), plan, family, self._forward, Silent(), make_walk=make_walk
            )
            precast.apply(model, applied, Silent())
        if zeros:
            applied.details["sparsity"] = zeros
        return applied

    def _observe(self, index: int, layer: nn.Module, _: Any) -> None:
        """One pass of the calibration data through the layer while ModelOpt watches."""
        step = partial(call_layer, layer, arguments=self._arguments, index=index)
        with self._forward.counting(f"{self._layered.prefix}.{index}."):
            self._stored(OBSERVED, index).advance(step)

    def _walk(self, index: int, compare: bool) -> LayerWalk:
        return LayerWalk(
            self._layered.model,
            self._stored(SHIPPED, index),
            self._arguments,
            layers=[index],
            compare=compare,
            counting=counts_on_walk(self._source.plan, self._forward),
        )

    def _no_walk(self, model: Any, compare: bool) -> LayerWalk:
        """Recipes that look at inputs leave the output projection alone: it is in no layer."""
        return LayerWalk(model, HeldHidden([]), {}, layers=[], compare=compare)

    @torch.no_grad()
    def _replay(self, model: Any, _: Any) -> None:
        """What lies behind the layers, on what the last of them computed."""
        stored = iter(self._stored(OBSERVED, len(self._layered)))
        found = find_decoder_layers(model)
        assert found is not None, "the layers' list was there when the model was opened"
        hook = found[1][0].register_forward_hook(lambda module, args, output: next(stored))
        try:
            for batch in self._forward.batches:
                model(input_ids=batch.to(self._layered.device), use_cache=False)
        finally:
            hook.remove()

    def _stored(self, stream: str, index: int) -> StoredHidden:
        return StoredHidden(
            self._records.hidden(stream, index),
            self._records.hidden(stream, index + 1),
            self._layout,
            self._layered.device,
        )

    def _exporter(self, applied: Applied, model: Any = None) -> Exporter:
        source = self._source
        return Exporter(
            model or self._layered.model,
            source.plan,
            source.family,
            source.directory,
            applied,
            reader=source.rows.reader,
        )

    def _commit(self, index: int, digests: dict[str, str], applied: Applied, inside: str) -> None:
        self.details.append(applied.details)
        extra = {
            path: counts.tolist() for path, counts in self._forward.extra.items() if path.startswith(inside)
        }
        measured = self._forward.coverage.measured
        coverage = coverage_json(self._forward.coverage, inside) if measured else {}
        record = {"digests": digests, "details": applied.details, "coverage": coverage, "extra": extra}
        self._records.commit(index, record, self.streams)


def _open_formats(source: Source) -> set[str]:
    """Formats of matrices whose numbers are not in the source already."""
    return {
        item.format
        for shard in source.outline.shards
        for item in shard.items
        if item.format != SOURCE_DTYPE
        and not item.kept_codes
        and not source.rows.casts(item.name, item.format)
    }


def merge_details(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the recipe did in all: entries by module joined, counts added."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict):
                total[key] = merge_details([total.get(key, {}), value])
            else:
                total[key] = total[key] + value if key in total else value
    return total
