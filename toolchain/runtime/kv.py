"""KV caches of several sequences in one: rows are padded on the left, concatenated, selected and trimmed.

Every layer is a plain growing layer that keeps all positions, also where the model attends to a sliding
window or a chunk: the model's own mask hides what is out of reach. (A layer that keeps only the window has
one offset for the whole batch, and rows of different lengths have different offsets.)
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


ROOM = 64
"""Positions that a layer reserves beyond what it holds: one step in 64 copies the cache, not every one."""


def new_cache() -> Any:
    """An empty ``transformers.DynamicCache`` whose layers keep all positions and grow in place."""
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.layer_class_to_replicate = _growing_layer()
    return cache


@functools.cache
def _growing_layer() -> type:
    """The class of our layers; made late, because its base is in transformers."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """``keys`` and ``values`` [B, H, T, D] are views into buffers with room behind them."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.keys = self._append("_key_buffer", self.keys, key_states)
            self.values = self._append("_value_buffer", self.values, value_states)
            return self.keys, self.values

        def _append(self, name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            begin, end = old.shape[-2], old.shape[-2] + new.shape[-2]
            buffer = getattr(self, name, None)
            # A merge or selection has put other tensors in place of our views: then the buffer is stale.
            if buffer is None or buffer.data_ptr() != old.data_ptr() or buffer.shape[-2] < end:
                buffer = new.new_empty((*new.shape[:2], end + ROOM, new.shape[-1]))
                buffer[:, :, :begin] = old
                setattr(self, name, buffer)
            buffer[:, :, begin:end] = new
            return buffer[:, :, :end]

    return GrowingLayer


def can_merge(cache: Any) -> bool:
    """Whether the cache that a model made for itself holds only attention keys and values.

    Linear-attention and state-space layers, indexer caches and caches of a model's own class hold states that
    left padding would change; such models run each request on its own.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def merge(first: Any, first_width: int, second: Any, second_width: int) -> None:
    """Append the rows of ``second`` below those of ``first``, in place; both padded on the left to one width.

    Layers hold keys and values [B, H, T, D] with T equal to the width given (in positions).
    """
    width = max(first_width, second_width)
    for mine, other in zip(first.layers, second.layers, strict=True):
        mine.keys = _stack(mine.keys, other.keys, width)
        mine.values = _stack(mine.values, other.values, width)


def keep(cache: Any, rows: Sequence[int], trim: int) -> None:
    """Keep only ``rows``, in this order, and drop ``trim`` positions on the left (padding), in place."""
    import torch

    for layer in cache.layers:
        index = torch.tensor(rows, device=layer.keys.device)
        layer.keys = layer.keys[:, :, trim:].index_select(0, index)
        layer.values = layer.values[:, :, trim:].index_select(0, index)


def _stack(first: torch.Tensor, second: torch.Tensor, width: int) -> torch.Tensor:
    import torch
    from torch.nn.functional import pad

    # Zeros, not what memory holds: a masked key still multiplies, and 0 * NaN is NaN.
    return torch.cat([pad(tensor, (0, 0, width - tensor.shape[-2], 0)) for tensor in (first, second)], dim=0)
