"""One tensor of the source to its tensors in the shard, a few rows at a time.

Every way of choosing numbers from weights alone looks at one row (or block of rows) at a time, once the largest
magnitude of the tensor and of those that share its scale is known. So the memory that is needed does not grow with the
tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import torch

from toolchain.checkpoint.shard_file import ShardFile
from toolchain.codecs import Calibrated, compiled, e2m1, exact, get_codec
from toolchain.codecs.fused import fuse_experts, split_experts
from toolchain.core.errors import ToolchainError
from toolchain.families import Family
from toolchain.formats import Format, get_format
from toolchain.plan.types import SOURCE_DTYPE
from toolchain.quantize.accuracy.grids import grid_of
from toolchain.quantize.accuracy.scale_search import choose_scales
from toolchain.quantize.quantizers import PINNED_AMAX
from toolchain.quantize.sparsity.magnitude import pruned
from toolchain.quantize.streaming.outline import Item, Outline
from toolchain.quantize.streaming.rows import Rows
from toolchain.recipes import Recipe

CHUNK_ELEMENTS = 1 << 21
"""Weights that one thread works on at a time; with the temporaries of a codec about 50 MB."""
COPY_BYTES = 1 << 22
ROWS_MULTIPLE = 128
"""Parts begin at multiples of it: the largest block of rows that shares a scale (FP8 blocks), and even (INT4)."""


class Packer:
    """Packs the items of one outline. Its methods may be called from several threads."""

    def __init__(
        self,
        rows: Rows,
        outline: Outline,
        family: Family,
        recipe: Recipe,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        sparse: bool = False,
    ) -> None:
        """``dtype``: what the model computes in, and its weights are rounded to first; None: as they are stored.
        ``sparse``: matrices are pruned to 2:4 by magnitude before they are quantized, which leaves the largest."""
        self.rows, self.outline, self.family, self.recipe = rows, outline, family, recipe
        self.dtype, self.device, self._sparse = dtype, device, sparse
        self._items = {item.module: item for shard in outline.shards for item in shard.items}
        self._amax: dict[str, Future[float]] = {}
        """Numbers, not tensors: a small tensor that stays lies in the way of the large ones that come and go, and the
        allocator takes megabytes more for each (1 GB for a source of 4 GB, glibc 2.36)."""
        self._lock = threading.Lock()
        self.cast: dict[str, dict[str, int]] = {}
        """Tensor -> blocks that were cast from MXFP4, and of them those whose codes had to be rounded again."""

    @torch.no_grad()
    def write(self, item: Item, file: ShardFile, *, input_amax: float | None = None) -> None:
        """Write what of ``item`` is in ``file``.

        ``input_amax``: largest magnitude of its inputs, a float32 number, that calibration found; None: as the recipe
        pins it, if the format has an input scale at all.
        """
        try:
            if item.kept_codes:
                self._copy_codes(item, file)
            elif item.format == SOURCE_DTYPE:
                self._copy(item, file)
            elif self.family.is_fused(item.module):
                self._pack_fused(item, file, self._inputs(item, input_amax))
            else:
                self._pack(item, file, self._inputs(item, input_amax))
        except ToolchainError as error:
            raise ToolchainError(f"{item.name}: {error.message}", hint=error.hint, code=error.code) from error
        finally:
            for name in self.rows.stored_names(item.name):
                self.rows.release(name)

    def _copy(self, item: Item, file: ShardFile) -> None:
        if self.rows.is_quantized(item.name):
            for start, part in self._parts(item.name):
                file.put(item.name, part, at=start)
            return
        self._copy_bytes(item.name, item.name, file)

    def _copy_codes(self, item: Item, file: ShardFile) -> None:
        for spec, stored in zip(item.outputs, self.rows.pair(item.name), strict=True):
            if spec.name in file.specs:
                self._copy_bytes(stored.name, spec.name, file)

    def _copy_bytes(self, stored: str, name: str, file: ShardFile) -> None:
        size = file.specs[name].bytes
        with self.rows.buffers.lent(COPY_BYTES) as buffer:
            for offset in range(0, size, COPY_BYTES):
                part = buffer[: size - offset]
                self.rows.read_into(stored, offset, part)
                file.put_bytes(name, part, offset=offset)

    def _inputs(self, item: Item, found: float | None) -> torch.Tensor | None:
        if found is None and self.recipe.for_format(item.format).on("inputs") == "pinned":
            found = PINNED_AMAX
        return None if found is None else torch.tensor(found, dtype=torch.float32)

    def _pack(self, item: Item, file: ShardFile, inputs: torch.Tensor | None) -> None:
        format = get_format(item.format)
        amax = self._shared_amax(item) if _has_tensor_scale(format) else None
        written: dict[str, int] = {}
        for _, part in self._parts(item.name):
            for suffix, tensor in self._numbers(part.to(self.device), format, amax, inputs).items():
                name = f"{item.module}.{suffix}"
                if name in file.specs and (tensor.dim() or name not in written):
                    file.put(name, tensor, at=written.get(name, 0))
                written[name] = written.get(name, 0) + (len(tensor) if tensor.dim() else 0)

    def _numbers(
        self, weight: torch.Tensor, format: Format, amax: torch.Tensor | None, inputs: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Tensors of some rows [n, K], as ``quantize/accuracy/weights.py`` chooses them without data."""
        recipe = self.recipe.for_format(format.name)
        if self._sparse:
            weight = pruned(weight)
        found = Calibrated(weight_amax=amax, input_amax=inputs)
        method = recipe.on("scales")
        if method is None:
            return get_codec(format.name).pack(weight, found)
        weight = weight.float()
        own = amax if amax is not None else weight.abs().amax()
        grid = grid_of(format.name, own, weight.shape[1])
        chosen = grid.stored(choose_scales(weight, grid, method))
        found = Calibrated(weight_amax=amax, input_amax=inputs, weight_scale=chosen)
        return get_codec(format.name).pack(weight, found)

    def _parts(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows [n, ...]) of a tensor, in order."""
        info = self.rows.reader.infos[name]
        count = info.shape[0] if info.shape else 1
        width = max(1, info.parameters // max(count, 1))
        step = max(1, CHUNK_ELEMENTS // width)
        multiple = max(self.rows.row_multiple(name), ROWS_MULTIPLE) if len(info.shape) == 2 else 1
        step = -(-step // multiple) * multiple
        for start in range(0, count, step):
            part = self.rows.read(name, start, min(count, start + step))
            yield start, part if self.dtype is None else part.to(self.dtype)

    def _shared_amax(self, item: Item) -> torch.Tensor:
        """Largest magnitude of the item and of those that share its scale.

        Each is looked at by whoever claims it first: two threads at gate and up look at one each.
        """
        members = self.outline.groups.get(item.module, (item.module,))
        for member in sorted(members, key=lambda name: name != item.module):
            self._claim(member)
        found = [self._amax[member].result() for member in members]
        return torch.tensor(found, dtype=torch.float32).amax()  # NaN, if one is

    def _claim(self, module: str) -> None:
        """Find the amax of ``module``, unless somebody does."""
        with self._lock:
            if module in self._amax:
                return
            known = self._amax[module] = Future()
        try:
            known.set_result(float(self._amax_of(self._items[module])))
        finally:
            if not known.done():  # whoever waits must not wait for ever
                known.cancel()

    def _amax_of(self, item: Item) -> torch.Tensor:
        for name in self.rows.stored_names(item.name):
            self.rows.hold(name)
        found = [compiled.largest_magnitude(part.to(self.device)) for _, part in self._parts(item.name)]
        return torch.stack(found).amax()

    def _pack_fused(self, item: Item, file: ShardFile, inputs: torch.Tensor | None) -> None:
        """Expert by expert: each is a slab of every tensor."""
        format = get_format(item.format)
        experts = self.rows.reader.infos[item.name].shape[0]
        largest = self._largest_exponent(item, experts)
        amax = self._amax_of(item) if largest is None and _has_tensor_scale(format) else None
        counts = {"blocks": 0, "requantized_blocks": 0}
        for expert in range(experts):
            if largest is None:
                matrices = [
                    self._numbers(part, format, amax, inputs) for part in self._matrices(item, expert)
                ]
            else:
                matrices = self._cast(item, expert, largest, counts, inputs)
            fused = fuse_experts(self.family, item.module, format.name, matrices)
            for name, tensor in fused.items():
                if name in file.specs and (tensor.dim() or expert == 0):
                    file.put(name, tensor, at=expert if tensor.dim() else 0)
        if largest is not None:
            self.cast[item.name] = counts

    def _matrices(self, item: Item, expert: int) -> list[torch.Tensor]:
        """[out, in] of every projection of one expert."""
        own = self.rows.read(item.name, expert, expert + 1)
        own = own if self.dtype is None else own.to(self.dtype)
        return [
            tensors["weight"].to(self.device)
            for _, tensors in split_experts(self.family, item.module, {"weight": own})
        ]

    def _largest_exponent(self, item: Item, experts: int) -> int | None:
        """Of a source whose MXFP4 numbers are cast; None for any other."""
        if not self.rows.casts(item.name, item.format):
            return None
        return max(
            exact.largest_exponent(codes["weight"], codes["weight_scale"])
            for expert in range(experts)
            for codes in self._codes(item, expert)
        )

    def _codes(self, item: Item, expert: int) -> list[dict[str, torch.Tensor]]:
        blocks, scales = self.rows.pair(item.name)
        stored = {
            "weight": self.rows.stored(blocks.name, expert, expert + 1),
            "weight_scale": self.rows.stored(scales.name, expert, expert + 1),
        }
        return [tensors for _, tensors in split_experts(self.family, item.module, stored)]

    def _cast(
        self, item: Item, expert: int, largest: int, counts: dict[str, int], inputs: torch.Tensor | None
    ) -> list[dict[str, torch.Tensor]]:
        matrices = []
        extra = {} if inputs is None else {"input_scale": e2m1.global_scale(inputs)}
        for codes in self._codes(item, expert):
            cast = exact.nvfp4_of_mxfp4(codes["weight"], codes["weight_scale"], largest)
            counts["blocks"] += cast.blocks
            counts["requantized_blocks"] += cast.requantized
            matrices.append({**cast.tensors, **extra})
        return matrices


def _has_tensor_scale(format: Format) -> bool:
    """True when a number of the weight is of the whole tensor: its largest magnitude must be known first."""
    weights = ("weight_scale", "weight_scale_2")
    return any(item.suffix in weights and item.shape(256, 256) == () for item in format.stored)
