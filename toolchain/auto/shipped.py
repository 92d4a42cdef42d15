"""What quantization makes of every matrix, put into the unquantized model one group at a time.

The tensors are those that the export writes and the runtime reads back (``Exporter.packed``, the codecs, the emulated
inputs of ``modeling/inputs.py``): a group in memory computes what it computes in a checkpoint, whatever the recipe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from toolchain.auto.groups import Group
from toolchain.codecs import get_codec
from toolchain.core.progress import Progress
from toolchain.families import Family
from toolchain.modeling.inputs import QuantizedInput
from toolchain.plan.types import Plan
from toolchain.quantize.job import calibrate
from toolchain.quantize.quantizers import planned_modules


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """The quantized parts of one plan, on the CPU."""

    family: Family
    formats: dict[str, str]
    """Module path -> format name."""
    tensors: dict[str, dict[str, torch.Tensor]] = field(repr=False)
    """Module path -> suffix -> tensor as stored."""
    norms: dict[str, torch.Tensor] = field(repr=False)
    """Module path of a norm that took a channel scale -> its weight."""

    def holds(self, group: Group) -> bool:
        return all(self.family.to_module(name) in self.formats for name in group.modules)

    @contextlib.contextmanager
    def put(self, model: nn.Module, group: Group) -> Iterator[None]:
        """``model`` with ``group`` quantized; as it was before at the end, to the bit."""
        kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        hooks = []
        try:
            for path in map(self.family.to_module, group.modules):
                linear: Any = model.get_submodule(path)
                codec, device = get_codec(self.formats[path]), linear.weight.device
                stored = {suffix: tensor.to(device) for suffix, tensor in self.tensors[path].items()}
                kept.append((linear.weight, linear.weight.data))
                linear.weight.data = codec.unpack(stored, linear.weight.dtype)
                hooks.append(QuantizedInput.of(linear, codec, stored).attach(device, emulate=True))
            for path in self._norms_of(group):
                norm: Any = model.get_submodule(path)
                kept.append((norm.weight, norm.weight.data))
                norm.weight.data = self.norms[path].to(norm.weight.device)
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data
            for hook in filter(None, hooks):
                hook.remove()

    def _norms_of(self, group: Group) -> Iterator[str]:
        """Norms that took the channel scale of this group: it is all that they feed."""
        paths = [self.family.to_module(name) for name in group.modules]
        for norm in self.norms:
            layer, _, name = norm.rpartition(".")
            consumers = next((found for known, found in self.family.norm_folds if known == name), ())
            if any(f"{layer}.{consumer}" in paths for consumer in consumers):
                yield norm


def ship(
    plan: Plan,
    *,
    device: str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress,
) -> Shipped:
    """Calibrate ``plan`` and keep what its export would write of quantized matrices. Writes nothing."""
    done = calibrate(plan, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress)
    exporter = done.exporter
    formats = planned_modules(done.model, plan, exporter.family)
    return Shipped(
        family=exporter.family,
        formats=formats,
        tensors={
            path: {
                suffix: tensor.cpu()
                for suffix, tensor in exporter.packed(exporter.family.to_checkpoint(path), name).items()
            }
            for path, name in formats.items()
        },
        norms={
            path: done.model.get_submodule(path).weight.data.clone().cpu()
            for path in exporter.applied.folded_norms
        },
    )
