"""Numbers that a quantized source already has: copied, or cast where that is exact, instead of quantized again.

FP8 blocks of 128 x 128 to ``fp8_block``, and MXFP4 to ``mxfp4``: the bytes. MXFP4 to NVFP4: the same values
(``codecs/exact.py``). No recipe can do better than no error, so recipes leave these modules alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from toolchain.checkpoint.reader import CheckpointReader
from toolchain.checkpoint.source import QuantizedSource
from toolchain.codecs import e2m1, exact, get_codec
from toolchain.codecs.fused import split_experts
from toolchain.core.progress import Progress
from toolchain.families import Family
from toolchain.formats import get_format
from toolchain.models.prequantized import keeps_values
from toolchain.quantize import scales
from toolchain.quantize.accuracy import Applied


class Precast:
    """What of ``modules`` (module path -> format name) has its numbers in the source."""

    def __init__(self, reader: CheckpointReader, modules: dict[str, str], family: Family) -> None:
        self.family, self.found = family, dict[str, list[str]]()
        self.formats = modules
        self.reader = reader
        if isinstance(reader, QuantizedSource):
            for name, paths in self._quantized(reader):
                chosen = {modules.get(path) for path in paths}
                only = chosen.pop() if len(chosen) == 1 else None
                if only is not None and keeps_values(reader.scheme, only):
                    self.found[name] = paths

    def _quantized(self, reader: QuantizedSource) -> Iterator[tuple[str, list[str]]]:
        """(tensor name, the module paths that it holds) for each quantized tensor of the source."""
        for name in reader.quantized:
            module, _ = self.family.split(name)
            names = [module]
            if self.family.is_fused(module):
                names = [
                    item
                    for group in self.family.members(module, reader.infos[name].shape[0])
                    for item in group
                ]
            yield name, [self.family.to_module(item) for item in names]

    def rest(self) -> dict[str, str]:
        """The modules that are quantized as usual."""
        taken = {path for paths in self.found.values() for path in paths}
        return {path: name for path, name in self.formats.items() if path not in taken}

    @torch.no_grad()
    def apply(self, model: nn.Module, applied: Applied, progress: Progress) -> None:
        """Put the stored tensors into ``applied.packed``; the modules compute on their values."""
        report: dict[str, Any] = {"copied": 0, "cast": {}}
        for name in progress.track(self.found, description="numbers of the source", total=len(self.found)):
            matrices = self._matrices(name)
            format_name = self.formats[self.found[name][0]]
            if format_name in ("mxfp4", "fp8_block"):
                applied.packed |= matrices
                report["copied"] += len(matrices)
                _keep(model, matrices)
            else:
                report["cast"][name] = _cast(model, matrices, format_name, applied)
        requantized = sum(item["requantized_blocks"] for item in report["cast"].values())
        if requantized:
            progress.note(
                f"{requantized} MXFP4 blocks are too small beside the largest of their tensor for E4M3 scales: their "
                f"codes were rounded again"
            )
        if self.found:
            applied.details["source_numbers"] = report

    def _matrices(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        """Module path -> stored tensors of one matrix, for each that the tensor ``name`` holds."""
        assert isinstance(self.reader, QuantizedSource)
        codes = self.reader.codes(name) or {}
        module, _ = self.family.split(name)
        if not self.family.is_fused(module):
            return {self.family.to_module(module): codes}
        return {
            self.family.to_module(item): tensors
            for item, tensors in split_experts(self.family, module, codes)
        }


def _keep(model: nn.Module, paths: dict[str, Any]) -> None:
    """The weights of these modules are the values of the codes already: nothing may round them."""
    for path in paths:
        module: Any = model.get_submodule(path)
        module.weight_quantizer.disable()


def _cast(
    model: nn.Module, matrices: dict[str, dict[str, torch.Tensor]], format_name: str, applied: Applied
) -> dict[str, int]:
    largest = max(exact.largest_exponent(item["weight"], item["weight_scale"]) for item in matrices.values())
    needs_input = get_format(format_name).has_input_scale
    blocks = requantized = 0
    for path, codes in matrices.items():
        cast = exact.nvfp4_of_mxfp4(codes["weight"], codes["weight_scale"], largest)
        module: Any = model.get_submodule(path)
        tensors = dict(cast.tensors)
        found = scales.calibrated(module, path, needs_input=needs_input)
        if needs_input and found.input_amax is not None:
            tensors["input_scale"] = e2m1.global_scale(found.input_amax)
        if cast.requantized:
            values = get_codec(format_name).unpack(tensors, module.weight.dtype)
            module.weight.data = values.to(module.weight.device)
        applied.packed[path] = tensors
        blocks, requantized = blocks + cast.blocks, requantized + cast.requantized
    _keep(model, matrices)
    return {"blocks": blocks, "requantized_blocks": requantized}
