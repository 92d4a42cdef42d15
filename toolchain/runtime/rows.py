"""Attention row by row on CPUs, so that what a request is answered does not depend on who else is in its batch.

Everything else in a decoder works on each position alone, and oneDNN's bfloat16 matmul gives a row the same bits
whatever the number of rows (measured: M = 1 to 128, K and N = 64 to 2048, AVX-512). Attention over a batch does not:
its rows are padded on the left to one width, and where a row begins decides in which order a vectorised kernel adds
up. So each row attends alone, over its own positions; that also leaves out the work on padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PREFIX = "toolchain_rows_"


class Geometry:
    """Of one forward: row i begins at column ``paddings[i]`` of ``width``."""

    def __init__(self, paddings: Sequence[int], width: int) -> None:
        self.paddings = tuple(paddings)
        self.width = width
        self._masks: dict[int, list[Any]] = {}

    def masks(self, mask: Any, queries: int, *, plain: bool) -> list[Any]:
        """``mask`` [B or 1, 1, Q, T] cut to each row's own positions, once for all layers that share it.

        ``plain``: a boolean mask that hides nothing but the future becomes None, which stands for just that: a row
        alone in its batch comes without a mask.
        """
        if id(mask) not in self._masks:
            self._masks[id(mask)] = [
                self._cut(mask, row, queries, plain=plain) for row in range(len(self.paddings))
            ]
        return self._masks[id(mask)]

    def _cut(self, mask: Any, row: int, queries: int, *, plain: bool) -> Any:
        if mask is None:
            return None
        padding = self.paddings[row]
        own = min(queries, self.width - padding)
        cut = mask[row : row + 1] if mask.shape[0] > 1 else mask
        cut = cut[:, :, mask.shape[2] - own :, padding:]
        return None if plain and _hides_only_the_future(cut) else cut


_geometry: ContextVar[Geometry | None] = ContextVar("geometry", default=None)


@contextmanager
def rows(paddings: Sequence[int], width: int) -> Iterator[None]:
    """While inside, the attention of models given to ``attend_by_row`` knows where its rows begin."""
    token = _geometry.set(Geometry(paddings, width))
    try:
        yield
    finally:
        _geometry.reset(token)


def attend_by_row(model: Any) -> bool:
    """Make ``model`` attend row by row where it takes its attention from the interface of transformers.

    Whether it does: False for implementations other than sdpa and eager, and for models that have their own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = getattr(model.config, "_attn_implementation", None)
    if name is None or not model._can_set_attn_implementation():
        return False
    if name not in ALL_MASK_ATTENTION_FUNCTIONS or name.startswith("flash") or name == "flex_attention":
        return False
    AttentionInterface.register(PREFIX + name, _by_row(name))
    AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation(PREFIX + name)
    return bool(model.config._attn_implementation == PREFIX + name)


def _by_row(name: str) -> Callable[..., Any]:
    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """query [B, H, Q, D], key and value [B, H, T, D] -> [B, Q, H, D] and no weights."""
        base = attention_of(name, module)
        geometry = _geometry.get()
        if geometry is None or (len(geometry.paddings), geometry.width) != (query.shape[0], key.shape[2]):
            return base(module, query, key, value, attention_mask, **kwargs)
        return _attend(base, geometry, module, (query, key, value), attention_mask, kwargs)

    return attend


def _attend(
    base: Callable[..., Any],
    geometry: Geometry,
    module: Any,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    import torch

    query, key, value = tensors
    queries = query.shape[2]
    plain = attention_mask is not None and attention_mask.dtype == torch.bool
    outputs = []
    for row, (padding, mask) in enumerate(
        zip(geometry.paddings, geometry.masks(attention_mask, queries, plain=plain), strict=True)
    ):
        own = min(queries, geometry.width - padding)
        output = base(
            module,
            query[row : row + 1, :, queries - own :],
            key[row : row + 1, :, padding:],
            value[row : row + 1, :, padding:],
            mask,
            **kwargs,
        )[0]
        if own < queries:
            output = torch.nn.functional.pad(output, (0, 0, 0, 0, queries - own, 0))
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), None


def attention_of(name: str, module: Any) -> Callable[..., Any]:
    """The function behind ``name``; a model's own one where it is called eager."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: Callable[..., Any]
    if name == "eager":
        found = sys.modules[type(module).__module__].eager_attention_forward
    else:
        found = ALL_ATTENTION_FUNCTIONS[name]
    return found


def _hides_only_the_future(mask: torch.Tensor) -> bool:
    """Of a boolean mask [1, 1, Q, T] whose last query stands at the last position."""
    queries, positions = mask.shape[-2:]
    if queries == 1:
        return bool(mask.all())
    return queries == positions and bool((mask == mask.new_ones(queries, positions).tril()).all())
