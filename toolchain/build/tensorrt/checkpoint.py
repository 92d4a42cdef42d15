"""Rank files of a unified checkpoint: ``config.json`` and ``rank{i}.safetensors``, as trtllm-build reads them.

The shapes are found first, by the same code on the meta device, from headers alone; then each file is filled in
place, a tensor (of experts: one expert) at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.build.tensorrt.decoder import Decoder
from toolchain.build.tensorrt.mapping import Parallel, Rank
from toolchain.build.tensorrt.pretrained import known_model, model_dtype, pretrained_config
from toolchain.checkpoint.quant_config import MIXED, read_quant_config
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.checkpoint.shard_file import ShardFile, TensorSpec
from toolchain.core.errors import UsageError
from toolchain.core.files import atomic_directory, atomic_write_json, require_free_bytes
from toolchain.core.progress import Progress, Silent
from toolchain.families import get_family
from toolchain.formats import format_of_algo
from toolchain.formats.base import Format
from toolchain.models.config import attention_of, read_config, text_config
from toolchain.targets.tensorrt import FORMATS, LEGACY_MODELS, model_refusals

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class LegacyCheckpoint:
    """What was written."""

    directory: Path
    config: dict[str, Any]
    rank_bytes: tuple[int, ...]
    """Size of each rank's file."""

    def facts(self) -> dict[str, Any]:
        return {
            "quant_algo": self.config["quantization"]["quant_algo"],
            "kv_cache_quant_algo": self.config["quantization"]["kv_cache_quant_algo"],
            "mapping": self.config["mapping"],
            "rank_bytes": list(self.rank_bytes),
        }


def write_legacy_checkpoint(
    checkpoint: Path,
    output: Path,
    parallel: Parallel,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> LegacyCheckpoint:
    """Convert ``checkpoint`` (a verified unified one) for ``parallel`` ranks into the new directory ``output``.

    UsageError TC-420 for a model or format that has no such checkpoint here; ToolchainError TC-421 where TensorRT would
    fuse matrices that disagree on a scale.
    """
    import torch

    progress = progress or Silent()
    reader = CheckpointReader(checkpoint)
    decoder, architecture, format, producer = _read(checkpoint, reader)
    config = pretrained_config(decoder, architecture, parallel, format, producer)
    dtype = getattr(torch, model_dtype(decoder.config))
    layouts = [(rank, _layout(decoder, reader, rank, dtype)) for rank in parallel.ranks()]
    total = sum(spec.bytes for _, specs in layouts for spec in specs)
    require_free_bytes(output, total, what="the TensorRT-LLM checkpoint")
    sizes = []
    with atomic_directory(output, force=force) as partial:
        with progress.meter(description="rank files", total_bytes=total) as count:
            for rank, specs in layouts:
                path = partial / f"rank{rank.number}.safetensors"
                _fill(path, specs, decoder, _Numbers(reader, dtype), rank, count)
                sizes.append(path.stat().st_size)
        atomic_write_json(partial / "config.json", config)
    return LegacyCheckpoint(directory=output, config=config, rank_bytes=tuple(sizes))


def _read(checkpoint: Path, reader: CheckpointReader) -> tuple[Decoder, str, Format | None, str]:
    """(decoder, architecture, the one format, version of ModelOpt) of a unified checkpoint."""
    config = text_config(read_config(checkpoint))
    architecture = config["architectures"][0]
    known_model(architecture)
    for reason in model_refusals(architecture, config):
        raise UsageError(f"{checkpoint}: {reason}", hint="use --target trtllm", code="TC-420")
    quant = read_quant_config(checkpoint)
    format = format_of_algo(quant.quant_algo) if quant and quant.quant_algo else None
    if quant and quant.quant_algo and (format is None or format.name not in FORMATS):
        what = "several formats" if quant.quant_algo == MIXED else quant.quant_algo
        raise UsageError(
            f"{checkpoint} is stored in {what}: there is no TensorRT-LLM checkpoint for that here",
            hint=f"one of {', '.join(FORMATS)} for the whole checkpoint, or --target trtllm",
            code="TC-420",
        )
    decoder = Decoder(
        model=LEGACY_MODELS[architecture],
        family=get_family(config.get("model_type", ""), architecture, reader.infos),
        config=config,
        attention=attention_of(config),
        format_of=quant.format_of if quant else lambda module: None,
        kv_algo=quant.kv_cache_quant_algo if quant else None,
    )
    return decoder, architecture, format, quant.producer_version if quant else ""


class _Numbers:
    def __init__(self, reader: CheckpointReader, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._reader = reader

    def has(self, name: str) -> bool:
        return name in self._reader.infos

    def get(self, name: str) -> torch.Tensor:
        return self._reader.get(name)


class _Shapes(_Numbers):
    def get(self, name: str) -> torch.Tensor:
        import torch

        if name not in self._reader.infos:
            return super().get(name)  # which raises
        info = self._reader.infos[name]
        return torch.empty(info.shape, dtype=torch_dtypes()[info.dtype], device="meta")


def torch_dtypes() -> dict[str, torch.dtype]:
    """Safetensors dtype name -> torch's, of what checkpoints hold."""
    import torch

    return {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
        "I8": torch.int8, "U8": torch.uint8,
    }  # fmt: skip


def _layout(decoder: Decoder, reader: CheckpointReader, rank: Rank, dtype: torch.dtype) -> list[TensorSpec]:
    """Every tensor of the rank's file, in the order in which it is made."""
    names = {kind: name for name, kind in torch_dtypes().items()}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, at, tensor in decoder.pieces(_Shapes(reader, dtype), rank):
        shape = (at + tensor.shape[0], *tensor.shape[1:])
        shapes[name] = (names[tensor.dtype], shape)
    return [TensorSpec(name=name, dtype=kind, shape=shape) for name, (kind, shape) in shapes.items()]


def _fill(
    path: Path, specs: list[TensorSpec], decoder: Decoder, source: _Numbers, rank: Rank, count: Any
) -> None:
    file = ShardFile(path, specs)
    try:
        for name, at, tensor in decoder.pieces(source, rank):
            file.put(name, tensor, at=at)
            count(tensor.numel() * tensor.element_size())
    except BaseException:
        file.abandon()
        raise
    file.close()
