"""Write the quantized checkpoint: the source's tensors under the source's names, quantized modules replaced.

Driven by the source files and not by the model in memory: what is not quantized is copied bit for bit, per-expert names
stay those of the hub, and nothing depends on how transformers renames modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.checkpoint.reader import CheckpointReader
from toolchain.checkpoint.source import open_source
from toolchain.checkpoint.writer import write_shards
from toolchain.codecs import get_codec
from toolchain.codecs.fused import fuse_experts
from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress
from toolchain.families import Family
from toolchain.formats import get_format, get_kv_cache
from toolchain.plan.types import SOURCE_DTYPE, Plan
from toolchain.quantize import scales
from toolchain.quantize.accuracy import Applied
from toolchain.quantize.export_configs import copy_side_files, is_matrix, write_configs


class Exporter:
    """Packs one quantized model in memory over the files of its source."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        family: Family,
        source: Path,
        applied: Applied,
        *,
        reader: CheckpointReader | None = None,
    ) -> None:
        self.model, self.plan, self.family, self.source = model, plan, family, source
        self.reader = reader or open_source(source)
        self.kv = scales.kv_scales(model)
        self.applied = applied

    def write(self, directory: Path, progress: Progress) -> int:
        """Shards, configs and side files into ``directory``; returns bytes of tensor data."""
        total = write_shards(directory, self._tensors(progress))
        config: Any = self.model.config
        tied = config.get_text_config().tie_word_embeddings
        write_configs(directory, self.plan, self.reader, self.family, tied=tied)
        copy_side_files(self.source, directory)
        return total

    def _format(self, module: str) -> str:
        return self.plan.format_of(self.family, module)

    def _tensors(self, progress: Progress) -> Iterator[tuple[str, torch.Tensor]]:
        infos = self.reader.infos
        for name in progress.track(infos, description="export", total=len(infos)):
            made = self.made(name)
            yield from [(name, self.reader.get(name))] if made is None else made
            yield from self.kv_scale(name)

    def made(self, name: str) -> list[tuple[str, torch.Tensor]] | None:
        """(name, tensor) of all that becomes of the tensor ``name`` of the source; None when it is kept."""
        info = self.reader.infos[name]
        module, suffix = self.family.split(name)
        if suffix != "weight":
            return None
        format_name = self._format(module)
        if format_name != SOURCE_DTYPE and is_matrix(self.family, module, info):
            if self.family.is_fused(module):
                return list(self._pack_fused(module, format_name, info.shape[0]))
            return [(f"{module}.{kind}", tensor) for kind, tensor in self.packed(module, format_name).items()]
        path = self.family.to_module(module)
        if path in self.applied.folded_norms:
            return [(name, self.model.get_submodule(path).weight.data)]
        return None

    @torch.no_grad()
    def packed(self, module: str, format_name: str) -> dict[str, torch.Tensor]:
        """One Linear's tensors by suffix, as a checkpoint with one entry per matrix stores them."""
        path = self.family.to_module(module)
        if path in self.applied.packed:
            return self.applied.packed[path]
        linear: Any = self.model.get_submodule(path)
        found = scales.calibrated(linear, path, needs_input=get_format(format_name).has_input_scale)
        return get_codec(format_name).pack(linear.weight.data, found)

    def _pack_fused(self, module: str, format_name: str, experts: int) -> Iterator[tuple[str, torch.Tensor]]:
        names = [name for group in self.family.members(module, experts) for name in group]
        matrices = [self.packed(name, format_name) for name in names]
        yield from fuse_experts(self.family, module, format_name, matrices).items()

    def kv_scale(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The scale of the KV cache that is stored beside the weight ``name`` of the source, if there is one."""
        module, suffix = self.family.split(name)
        if suffix != "weight":
            return
        parent, _, projection = self.family.to_module(module).rpartition(".")
        if parent in self.kv and projection in ("k_proj", "v_proj"):
            index = 0 if projection == "k_proj" else 1
            yield f"{module}.{projection[0]}_scale", self.kv[parent][index]


def require_kv_scales(exporter: Exporter, plan: Plan, layers: int) -> None:
    """ToolchainError TC-206 when a calibrated cache was planned and some attention layer got no scales."""
    if get_kv_cache(plan.kv_cache).calibrated and len(exporter.kv) != layers:
        raise ToolchainError(
            f"KV cache {plan.kv_cache} was planned, but {len(exporter.kv)} of {layers} attention layers were "
            f"calibrated for it",
            hint="this attention is not one that ModelOpt can observe: use --kv-cache none",
            code="TC-206",
        )
