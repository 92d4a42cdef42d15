"""What a streamed checkpoint will hold, known from headers and the plan alone: every tensor, its size, its shard.

The order of tensors and the division into shards are those of ``quantize/export.py``: both ways of quantizing write the
same files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from toolchain.checkpoint.reader import CheckpointReader
from toolchain.checkpoint.shard_file import TensorSpec
from toolchain.checkpoint.source import QuantizedSource
from toolchain.checkpoint.writer import SHARD_BYTES, shard_names
from toolchain.families import Family
from toolchain.families.fused import MXFP4
from toolchain.formats import Format, get_format, get_kv_cache
from toolchain.models.prequantized import keeps_values
from toolchain.models.types import TensorInfo
from toolchain.plan.types import SOURCE_DTYPE, Plan
from toolchain.quantize import quantizers
from toolchain.recipes import get_recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One tensor of the source, and what it becomes."""

    name: str
    """In the source."""
    module: str
    format: str
    """``source`` for a tensor that is kept."""
    outputs: tuple[TensorSpec, ...]
    source: TensorInfo = field(repr=False)
    kept_codes: bool = False
    """True where the source has the format's numbers already: its bytes are copied."""
    folded: bool = False
    """True for a norm that takes a channel scale."""

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.outputs)


@dataclass(frozen=True, kw_only=True)
class Shard:
    file: str
    """Its name once all shards are there."""
    items: tuple[Item, ...]
    outputs: tuple[TensorSpec, ...]
    """Tensors in this file. A tensor of an item that began in the shard before may be here alone."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    shards: tuple[Shard, ...]
    groups: dict[str, tuple[str, ...]] = field(repr=False)
    """Module -> the modules that share its scale of the tensor (q/k/v, gate/up), itself included."""

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for shard in self.shards for spec in shard.outputs)


def make_outline(
    plan: Plan,
    reader: CheckpointReader,
    family: Family,
    *,
    layers: int = 0,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Outline:
    """``layers``: decoder layers that run; those beyond have no KV cache. ``dtype``: what the model computes in, as a
    safetensors name; None: what its files hold."""
    items = tuple(_with_extras(_items(plan, reader, family), plan, family, layers, dtype))
    return Outline(shards=_shards(items, shard_bytes), groups=_groups(items, family))


def _with_extras(
    items: Iterable[Item], plan: Plan, family: Family, layers: int, dtype: str | None
) -> Iterator[Item]:
    """Tensors that not every module of a format has: channel scales where no norm takes them, scales of the KV cache;
    and the dtype of norms that take a channel scale, which are written by the model."""
    items = list(items)
    modules = {family.to_module(item.module): item.format for item in items if item.format != SOURCE_DTYPE}
    present = {family.to_module(item.module) for item in items}
    norms, folded = quantizers.fold_sites(present, modules, family)
    transformed = get_recipe(plan.recipe, get_format(plan.format)).on("transform") is not None
    calibrated = get_kv_cache(plan.kv_cache).calibrated
    for item in items:
        path, extra = family.to_module(item.module), []
        if item.format != SOURCE_DTYPE and get_format(item.format).has_pre_quant_scale and path not in folded:
            weight = item.source
            name = f"{item.module}.pre_quant_scale"
            extra.append(TensorSpec(name=name, dtype=dtype or weight.dtype, shape=(weight.shape[1],)))
        if transformed and path in norms and item.name.endswith(".weight"):
            kept = [replace(spec, dtype=dtype or spec.dtype) for spec in item.outputs]
            item = replace(item, outputs=tuple(kept), folded=True)
        if calibrated and item.name.endswith(("k_proj.weight", "v_proj.weight")):
            part = family.classify(item.module)
            if part.layer is not None and part.layer < layers and not family.is_tower(item.name):
                name = f"{item.module}.{part.projection[0]}_scale"
                extra.append(TensorSpec(name=name, dtype="F32", shape=()))
        yield replace(item, outputs=(*item.outputs, *extra)) if extra else item


def _items(plan: Plan, reader: CheckpointReader, family: Family) -> Iterator[Item]:
    for name, info in reader.infos.items():
        module, suffix = family.split(name)
        format_name = plan.format_of(family, module) if suffix == "weight" else SOURCE_DTYPE
        is_fused = len(info.shape) == 3 and family.is_fused(module)
        if format_name == SOURCE_DTYPE or not (len(info.shape) == 2 or is_fused):
            kept = TensorSpec(name=name, dtype=info.dtype, shape=info.shape)
            yield Item(name=name, module=module, format=SOURCE_DTYPE, outputs=(kept,), source=info)
            continue
        format = get_format(format_name)
        kept_codes = _keeps_codes(reader, name, format_name)
        if isinstance(reader, QuantizedSource) and kept_codes:
            specs: Iterable[TensorSpec] = _codes(family, module, format_name, reader.pair(name))
        else:
            specs = _fused(family, module, format, info) if is_fused else _matrix(module, format, info)
        yield Item(
            name=name,
            module=module,
            format=format_name,
            outputs=tuple(specs),
            source=info,
            kept_codes=kept_codes,
        )


def _keeps_codes(reader: CheckpointReader, name: str, format_name: str) -> bool:
    return (
        isinstance(reader, QuantizedSource)
        and name in reader.quantized
        and keeps_values(reader.scheme, format_name)
        and format_name in ("mxfp4", "fp8_block")
    )


def _codes(
    family: Family, module: str, format_name: str, pair: tuple[TensorInfo, TensorInfo]
) -> Iterator[TensorSpec]:
    suffixes = ("weight", "weight_scale_inv" if format_name == "fp8_block" else "weight_scale")
    for suffix, info in zip(suffixes, pair, strict=True):
        name = family.join(module, suffix, format_name)
        yield TensorSpec(name=name, dtype=info.dtype, shape=info.shape)


def _matrix(module: str, format: Format, info: TensorInfo) -> Iterator[TensorSpec]:
    rows, columns = info.shape
    for item in format.stored:
        if item.required:
            dtype = info.dtype if item.dtype == "source" else item.dtype
            yield TensorSpec(name=f"{module}.{item.suffix}", dtype=dtype, shape=item.shape(rows, columns))


def _fused(family: Family, module: str, format: Format, info: TensorInfo) -> Iterator[TensorSpec]:
    """As ``codecs/fused.py`` joins the experts: transposed after packing, but for the published MXFP4."""
    experts, columns, rows = info.shape
    for item in format.stored:
        if not item.required:
            continue
        shape = item.shape(rows, columns)
        if shape and format.name != MXFP4:
            shape = (experts, *reversed(shape))
        elif shape and item.suffix == "weight":
            shape = (experts, rows, columns // 32, 16)
        elif shape:
            shape = (experts, *shape)
        name = family.join(module, item.suffix, format.name)
        yield TensorSpec(name=name, dtype=info.dtype if item.dtype == "source" else item.dtype, shape=shape)


def _shards(items: tuple[Item, ...], shard_bytes: int) -> tuple[Shard, ...]:
    parts: list[tuple[list[Item], list[TensorSpec]]] = [([], [])]
    used = 0
    for item in items:
        for spec in item.outputs:
            if parts[-1][1] and used + spec.bytes > shard_bytes:
                parts.append(([], []))
                used = 0
            owners, specs = parts[-1]
            if not owners or owners[-1] is not item:
                owners.append(item)
            specs.append(spec)
            used += spec.bytes
    names = shard_names(len(parts))
    return tuple(
        Shard(file=name, items=tuple(owners), outputs=tuple(specs))
        for name, (owners, specs) in zip(names, parts, strict=True)
    )


def _groups(items: Iterable[Item], family: Family) -> dict[str, tuple[str, ...]]:
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for item in items:
        if item.format != SOURCE_DTYPE and not family.is_fused(item.module):
            found.setdefault(family.shared_scales(item.module), []).append(item.module)
    return {module: tuple(modules) for modules in found.values() for module in modules}
