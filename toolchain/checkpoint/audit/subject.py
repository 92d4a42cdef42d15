"""What an audit looks at: a checkpoint directory, read once, sorted by module."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from toolchain.checkpoint.compressed import CompressedReader, is_compressed
from toolchain.checkpoint.quant_config import FILE, QuantConfig, read_quant_config
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.errors import ToolchainError
from toolchain.core.files import read_json
from toolchain.families import Family, get_family
from toolchain.formats import WEIGHT_SCALES, Format, Stored, format_of_algo
from toolchain.models.config import read_config
from toolchain.models.types import TensorInfo, decoder_part
from toolchain.plan.types import Plan

KV_SUFFIXES = ("k_scale", "v_scale")
MX_NAMES = ("_blocks", "_scales")
"""Ends of the fused names that store the output dimension first."""


@dataclass
class Subject:
    """A checkpoint under audit. ``modules``: module name -> suffix -> TensorInfo."""

    directory: Path
    reader: CheckpointReader
    config: dict[str, Any]
    quant: QuantConfig
    family: Family
    modules: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)

    @cached_property
    def num_layers(self) -> int:
        text = self.config.get("text_config") or self.config
        return int(text.get("num_hidden_layers", 0))

    @cached_property
    def quantized(self) -> dict[str, str]:
        """Module -> quant_algo, for every module whose bytes are quantized: it has a weight scale."""
        found = {}
        for name, tensors in self.modules.items():
            if tensors.keys() & set(WEIGHT_SCALES):
                found[name] = self.quant.algo_of(name) or self.quant.quant_algo or ""
        return found

    @cached_property
    def plain(self) -> list[str]:
        """Modules with an unquantized matrix."""
        return [
            name
            for name, tensors in self.modules.items()
            if name not in self.quantized and "weight" in tensors and len(tensors["weight"].shape) >= 2
        ]

    def scale_suffixes(self, module: str) -> set[str]:
        """Suffixes of ``module``'s tensors whose values must be finite and positive, present or not."""
        found = self.format_of(module) if module in self.quantized else None
        items = [item for item in found.stored if item.scale] if found else []
        return {name for item in items for name in (item.suffix, *item.aliases)} | set(KV_SUFFIXES)

    def format_of(self, module: str) -> Format | None:
        return format_of_algo(self.quantized[module])

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """Formats of the quantized modules."""
        found = {format_of_algo(algo) for algo in set(self.quantized.values())}
        return tuple(item for item in found if item)

    def stored(self, module: str, item: Stored) -> TensorInfo | None:
        """The tensor of ``module`` that holds ``item``, under whichever of its suffixes; None when it is missing."""
        tensors = self.modules[module]
        return next((tensors[name] for name in (item.suffix, *item.aliases) if name in tensors), None)

    def part(self, module: str) -> Any:
        return decoder_part(self.family, module, self.num_layers)

    def weight_shape(self, module: str) -> tuple[int, int] | None:
        """(out_features, in_features) undone from the stored shape; None when it is not a matrix."""
        found = self.format_of(module)
        stored = self.modules[module].get("weight")
        shape = self.own_shape(module, stored) if stored else ()
        if found is None or len(shape) != 2:
            return None
        unit_out, unit_in = next(item for item in found.stored if item.suffix == "weight").shape(
            1 << 10, 1 << 10
        )
        rows, columns = shape
        return rows * (1 << 10) // unit_out, columns * (1 << 10) // unit_in

    def own_shape(self, module: str, info: TensorInfo) -> tuple[int, ...]:
        """Shape of a tensor of ``module``; of fused experts that of one expert, output dimension first.

        A tensor with another number of experts than the weight keeps its shape, which then fits nothing.
        """
        if not self.family.is_fused(module) or len(info.shape) < 2 or info.shape[0] != self.copies(module):
            return info.shape
        own = info.shape[1:]
        if info.name.endswith(MX_NAMES):
            return (own[0], prod(own[1:]))
        return own[::-1]

    def copies(self, module: str) -> int:
        """How many matrices ``module`` holds: 1, or the experts of a fused one (gate and up count as one)."""
        weight = self.modules[module].get("weight")
        return weight.shape[0] if weight is not None and self.family.is_fused(module) else 1

    def excluded_as(self, module: str) -> tuple[str, ...]:
        """Names under which a quantization config may exclude a module: fused experts also under their parent's."""
        return (module, module.rpartition(".")[0]) if self.family.is_fused(module) else (module,)

    def excludes(self, module: str) -> bool:
        return any(self.quant.excludes(name) for name in self.excluded_as(module))


def open_subject(directory: Path) -> Subject:
    """Read headers and configs. ToolchainError when the directory is not a quantized checkpoint at all.

    A compressed-tensors directory is looked at as what it would be in ModelOpt's layout (``compressed.py``).
    """
    config = read_config(directory)
    if is_compressed(config) and not (directory / FILE).is_file():
        compressed = CompressedReader(directory, config)
        return _sorted(directory, compressed, config, compressed.quant, compressed.family)
    quant = read_quant_config(directory)
    if quant is None or quant.quant_algo is None:
        raise ToolchainError(
            f"{directory} names no quantization algorithm (hf_quant_config.json or config.json)",
            hint="only quantized checkpoints are audited; quantize it first",
            code="TC-302",
        )
    reader = CheckpointReader(directory)
    family = get_family(
        str(config.get("model_type", "")), config["architectures"][0], list(reader.infos), config=config
    )
    return _sorted(directory, reader, config, quant, family)


def _sorted(
    directory: Path, reader: CheckpointReader, config: dict[str, Any], quant: QuantConfig, family: Family
) -> Subject:
    subject = Subject(directory=directory, reader=reader, config=config, quant=quant, family=family)
    for name, info in reader.infos.items():
        module, suffix = family.split(name)
        subject.modules.setdefault(module, {})[suffix] = info
    return subject


def read_plan_beside(directory: Path) -> Plan | None:
    """plan.json in the directory or above it (an engine keeps it above ``checkpoint/``); None if there is none."""
    for path in (directory / "plan.json", directory.parent / "plan.json"):
        if path.is_file():
            try:
                return Plan.from_json(read_json(path))
            except (KeyError, TypeError) as error:
                raise ToolchainError(f"{path} is not a plan: {error}", code="TC-003") from error
    return None
