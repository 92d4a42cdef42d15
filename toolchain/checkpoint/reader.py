"""Read tensors of a sharded safetensors directory by name, memory-mapped: nothing is loaded before it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.core.errors import ToolchainError
from toolchain.families import Family
from toolchain.models.shards import read_tensors
from toolchain.models.types import TensorInfo

if TYPE_CHECKING:
    import torch


class CheckpointReader:
    """``infos`` maps tensor name -> TensorInfo (validated headers); ``get`` maps one tensor.

    ``stored`` are the tensors of the files; subclasses show others in ``infos``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tensors = read_tensors(directory)
        if tensors is None:
            raise ToolchainError(
                f"{directory} holds no safetensors files",
                hint="a model with config.json alone can be planned, not quantized: fetch its weights",
                code="TC-303",
            )
        self.stored: dict[str, TensorInfo] = {info.name: info for info in tensors}
        self.infos = self.stored
        self._open: dict[str, Any] = {}

    def get(self, name: str) -> torch.Tensor:
        """The tensor called ``name``. ToolchainError if the checkpoint has none."""
        if name not in self.infos:
            raise ToolchainError(f"{self.directory} has no tensor {name}", code="TC-303")
        return self._shard(self.infos[name].file).get_tensor(name)

    def origin(self, name: str) -> str:
        """The stored tensor that ``name`` of ``infos`` is made of; empty when it is made of none."""
        return name

    def _shard(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._open:
            self._open[file] = safe_open(self.directory / file, framework="pt").__enter__()
        return self._open[file]

    def modules(self, family: Family) -> Iterator[tuple[str, dict[str, str]]]:
        """(module name, suffix -> tensor name), in the order of the shards: ``...q_proj`` -> {weight, weight_scale}."""
        grouped: dict[str, dict[str, str]] = {}
        for name in self.infos:
            module, suffix = family.split(name)
            grouped.setdefault(module, {})[suffix] = name
        yield from grouped.items()
