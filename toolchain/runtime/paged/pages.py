"""The memory of the KV cache in pages, per layer, and the transformers cache that one decoding step writes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

from toolchain.codecs import fp8
from toolchain.runtime.paged.pool import PagePool


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Of the keys and values of one layer."""

    heads: int
    key_size: int
    value_size: int

    @property
    def elements(self) -> int:
        """Of one position."""
        return self.heads * (self.key_size + self.value_size)


@dataclass(kw_only=True)
class Layer:
    keys: torch.Tensor
    """[pages, positions of a page, heads, size of a key], in the model's dtype or uint8 bits of E4M3."""
    values: torch.Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0


@dataclass(kw_only=True)
class Step:
    """What one decoding step works on, on the device."""

    slots: torch.Tensor
    """int32 [rows]."""
    lengths: torch.Tensor
    """int32 [rows]: positions of each row, the new one included."""
    stored: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    """Layer -> the keys and values that the model gave to its cache."""


class KvPages:
    """``table`` int32 [slots + 1, pages of a slot]: the last slot is of rows that only fill up a batch."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        pool: PagePool,
        *,
        device: torch.device,
        dtype: torch.dtype,
        in_fp8: bool = False,
        scales: Mapping[int, tuple[float, float]] | None = None,
    ) -> None:
        """``scales``: layer -> scale of keys and of values, for FP8; 1 where there is none."""
        self.pool, self.in_fp8 = pool, in_fp8
        kind = torch.uint8 if in_fp8 else dtype
        self.layers = []
        for index, shape in enumerate(shapes):
            size = (pool.pages + 1, pool.page_size, shape.heads)
            key_scale, value_scale = (scales or {}).get(index, (1.0, 1.0))
            self.layers.append(
                Layer(
                    keys=torch.zeros((*size, shape.key_size), dtype=kind, device=device),
                    values=torch.zeros((*size, shape.value_size), dtype=kind, device=device),
                    key_scale=key_scale,
                    value_scale=value_scale,
                )
            )
        self.table = torch.zeros((pool.slots + 1, pool.pages_per_slot), dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def adopt(self, owner: Any, cache: Any, row: int, length: int) -> None:
        """Copy the last ``length`` positions of ``row`` of a transformers cache into the pages of ``owner``."""
        holding = self.pool.of(owner)
        pages = torch.tensor(holding.pages, dtype=torch.int32, device=self.table.device)
        self.table[holding.slot, : len(pages)] = pages
        position = torch.arange(length, device=self.table.device)
        page = pages.long()[position // self.pool.page_size]
        place = position % self.pool.page_size
        for layer, source in zip(self.layers, cache.layers, strict=True):
            for target, given, scale in (
                (layer.keys, source.keys, layer.key_scale),
                (layer.values, source.values, layer.value_scale),
            ):
                target[page, place] = self._stored(given[row, :, -length:].transpose(0, 1), scale)

    def append(self, index: int, keys: torch.Tensor, values: torch.Tensor, step: Step) -> None:
        """keys and values [rows, heads, size] of the new position of each row."""
        layer = self.layers[index]
        position = (step.lengths - 1).long()
        page = self.table[step.slots.long(), position // self.pool.page_size].long()
        place = position % self.pool.page_size
        layer.keys[page, place] = self._stored(keys, layer.key_scale)
        layer.values[page, place] = self._stored(values, layer.value_scale)

    def _stored(self, given: torch.Tensor, scale: float) -> torch.Tensor:
        if not self.in_fp8:
            return given
        return fp8.encode(given, scale * fp8.E4M3_MAX).view(torch.uint8)


class StepCache(Cache):
    """What a model takes for its cache in one step: it only writes, attention reads the pages itself."""

    def __init__(self, pages: KvPages, step: Step) -> None:
        super().__init__(layers=[])
        self._pages, self._step = pages, step

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._pages.append(layer_idx, key_states[:, :, 0], value_states[:, :, 0], self._step)
        self._step.stored[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1


def shapes_of(cache: Any) -> list[LayerShape]:
    """Of a transformers cache that holds something."""
    return [
        LayerShape(
            heads=layer.keys.shape[1], key_size=layer.keys.shape[-1], value_size=layer.values.shape[-1]
        )
        for layer in cache.layers
    ]
