"""Write the quantized checkpoint: the source's tensors under the source's names, quantized modules replaced.

Driven by the source files and not by the model in memory: what is not quantized is copied bit for bit, per-expert names
stay those of the hub, and nothing depends on how transformers renames modules.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.checkpoint.quant_config import (
    FILE,
    MIXED,
    PUBLISHED_MXFP4,
    TIED_HEAD,
    QuantConfig,
    algo_per_module,
    render_flat,
    render_legacy,
    summarize_excluded,
)
from toolchain.checkpoint.source import open_source
from toolchain.checkpoint.writer import write_shards
from toolchain.codecs import get_codec
from toolchain.codecs.fused import fuse_experts
from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json, read_json
from toolchain.core.progress import Progress
from toolchain.core.roles import Role
from toolchain.families import Family
from toolchain.families.fused import MXFP4
from toolchain.formats import get_format, get_kv_cache
from toolchain.models.types import TensorInfo
from toolchain.plan.types import SOURCE_DTYPE, Plan
from toolchain.quantize import scales
from toolchain.quantize.accuracy import Applied

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
"""What travels beside the weights: tokenizer, generation config, templates, licences."""
NOT_COPIED = (
    "config.json",
    FILE,
    "model.safetensors.index.json",
    "plan.json",
    "quantize.json",
    "coverage.json",
)


class Exporter:
    """Packs one quantized model in memory over the files of its source."""

    def __init__(self, model: nn.Module, plan: Plan, family: Family, source: Path, applied: Applied) -> None:
        self.model, self.plan, self.family, self.source = model, plan, family, source
        self.reader = open_source(source)
        self.kv = scales.kv_scales(model)
        self.applied = applied

    def write(self, directory: Path, progress: Progress) -> int:
        """Shards, configs and side files into ``directory``; returns bytes of tensor data."""
        total = write_shards(directory, self._tensors(progress))
        quantized = [name for name in self._modules() if self._format(name) != SOURCE_DTYPE]
        self._write_configs(directory, quantized)
        self._copy_side_files(directory)
        return total

    def _modules(self) -> Iterator[str]:
        """Names of modules with a matrix: what a quantization config speaks about."""
        for info in self.reader.infos.values():
            module, suffix = self.family.split(info.name)
            if suffix == "weight" and self._is_matrix(module, info):
                yield module

    def _is_matrix(self, module: str, info: TensorInfo) -> bool:
        """True for what a format can be given to: [out, in], or the fused experts of a layer."""
        return len(info.shape) == 2 or (len(info.shape) == 3 and self.family.is_fused(module))

    def _format(self, module: str) -> str:
        return self.plan.format_of(self.family, module)

    def _tensors(self, progress: Progress) -> Iterator[tuple[str, torch.Tensor]]:
        infos = self.reader.infos
        for name in progress.track(infos, description="export", total=len(infos)):
            module, suffix = self.family.split(name)
            format_name = self._format(module)
            quantized = format_name != SOURCE_DTYPE and self._is_matrix(module, infos[name])
            if suffix == "weight" and quantized and self.family.is_fused(module):
                yield from self._pack_fused(module, format_name, infos[name].shape[0])
            elif suffix == "weight" and quantized:
                for kind, tensor in self.packed(module, format_name).items():
                    yield f"{module}.{kind}", tensor
            elif suffix == "weight" and self.family.to_module(module) in self.applied.folded_norms:
                yield name, self.model.get_submodule(self.family.to_module(module)).weight.data
            else:
                yield name, self.reader.get(name)
            if suffix == "weight":
                yield from self._kv_scale(module)

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

    def _kv_scale(self, module: str) -> Iterator[tuple[str, torch.Tensor]]:
        parent, _, projection = self.family.to_module(module).rpartition(".")
        if parent in self.kv and projection in ("k_proj", "v_proj"):
            index = 0 if projection == "k_proj" else 1
            yield f"{module}.{projection[0]}_scale", self.kv[parent][index]

    def _write_configs(self, directory: Path, quantized: list[str]) -> None:
        import modelopt

        if self.family.fuses_experts and self.plan.format == MXFP4:
            config = {**read_json(self.source / "config.json"), "quantization_config": PUBLISHED_MXFP4}
            atomic_write_json(directory / "config.json", config)
            return
        taken = {name: get_format(self._format(name)) for name in quantized}
        excludable = [name for name in (*self._modules(), *self._tied_head()) if name not in taken]
        algos = {found.quant_algo for found in taken.values()}
        # A quantized head is read from the list of MIXED_PRECISION only (TensorRT-LLM, ``modeling_utils.py``).
        mixed = len(algos) > 1 or any(self.family.classify(name).role is Role.LM_HEAD for name in taken)
        legacy = render_legacy(
            QuantConfig(
                quant_algo=MIXED if mixed else algos.pop(),
                quantized_layers=algo_per_module(taken, self.family) if mixed else {},
                kv_cache_quant_algo=get_kv_cache(self.plan.kv_cache).quant_algo,
                exclude_modules=summarize_excluded(self._linear_like(excludable), taken),
                producer_version=modelopt.__version__,
            )
        )
        atomic_write_json(directory / FILE, legacy)
        config = {**read_json(self.source / "config.json"), "quantization_config": render_flat(legacy)}
        atomic_write_json(directory / "config.json", config)

    def _tied_head(self) -> tuple[str, ...]:
        """A head that shares the embedding's weight is no tensor here, but runtimes build a module for it."""
        config: Any = self.model.config
        tied = config.get_text_config().tie_word_embeddings
        return (TIED_HEAD,) if tied and f"{TIED_HEAD}.weight" not in self.reader.infos else ()

    def _linear_like(self, names: list[str]) -> list[str]:
        """Matrices that a runtime could take for a Linear; norms have none, everything else is listed."""
        return [name for name in names if self.family.classify(name).role is not Role.NORM]

    def _copy_side_files(self, directory: Path) -> None:
        for pattern in SIDE_FILES:
            for path in sorted(self.source.glob(pattern)):
                if path.is_file() and path.name not in NOT_COPIED:
                    shutil.copyfile(path, directory / path.name)


def require_kv_scales(exporter: Exporter, plan: Plan, layers: int) -> None:
    """ToolchainError TC-206 when a calibrated cache was planned and some attention layer got no scales."""
    if get_kv_cache(plan.kv_cache).calibrated and len(exporter.kv) != layers:
        raise ToolchainError(
            f"KV cache {plan.kv_cache} was planned, but {len(exporter.kv)} of {layers} attention layers were "
            f"calibrated for it",
            hint="this attention is not one that ModelOpt can observe: use --kv-cache none",
            code="TC-206",
        )
