"""Walk a decoder layer by layer: every layer sees the outputs of the layers before it as they will ship.

One pass over the data for the inputs of the first layer, then at least two per layer: one that observes, one that
computes the inputs of the next. Only one layer's statistics are in memory at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import nn

from toolchain.core.errors import ToolchainError
from toolchain.modeling.decoder import find_decoder_layers

Arguments = dict[tuple[int, torch.Size], tuple[tuple[Any, ...], dict[str, Any]]]
"""(layer, [B, T]) -> what the model gives the layer beside the hidden states: masks and positions, which follow from
the shape alone, since no calibration token is padding."""


class Hidden(Protocol):
    """The hidden states [B, T, H] of every batch in front of one layer."""

    def __iter__(self) -> Iterator[torch.Tensor]: ...

    def advance(self, step: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Become what ``step`` makes of each batch."""


class HeldHidden:
    """All of them in memory."""

    def __init__(self, batches: Iterable[torch.Tensor]) -> None:
        self._batches = list(batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._batches)

    def advance(self, step: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for index, batch in enumerate(self._batches):
            self._batches[index] = step(batch)


class LayerWalk:
    """``for layer in walk:`` observe it with ``run()``, change it, and its successor sees the changed outputs."""

    def __init__(
        self,
        model: Any,
        hidden: Hidden,
        arguments: Arguments,
        *,
        layers: Iterable[int] | None = None,
        compare: bool = False,
        counting: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> None:
        """``hidden``: in front of the first of ``layers`` (None: all). ``compare``: keep each layer as it was in
        ``before`` while it changes. ``counting``: entered with a layer's module path, and a dot, for the pass that
        computes the layer's outputs.

        ToolchainError TC-209 when the model has no list of decoder layers.
        """
        self.prefix, self._layers = decoder_layers(model)
        self._visited = list(range(len(self._layers)) if layers is None else layers)
        self._arguments, self._hidden = arguments, hidden
        self._compare, self._counting, self._at = compare, counting, 0
        self.before: nn.Module | None = None
        """The layer at hand without any quantizer and with its own weights."""

    def __len__(self) -> int:
        return len(self._visited)

    @property
    def path(self) -> str:
        """Module path of the layer at hand."""
        return f"{self.prefix}.{self._at}"

    def __iter__(self) -> Iterator[nn.Module]:
        for index in self._visited:
            layer = self._layers[index]
            self._at = index
            self.before = _unquantized_copy(layer) if self._compare else None
            yield layer
            self.before = None
            if self._counting is None and index + 1 == len(self._layers):
                return  # nobody needs what the last layer computes
            with _rounded_once(layer), self._counting(f"{self.path}.") if self._counting else nullcontext():
                self._hidden.advance(partial(self._call, layer))

    def run(self, after_batch: Callable[[], None] | None = None, *, batches: int | None = None) -> None:
        """Send the inputs through the layer at hand, then through ``before``; outputs are dropped. For hooks."""
        for hidden in islice(self._hidden, batches):
            self._call(self._layers[self._at], hidden)
            if self.before is not None:
                self._call(self.before, hidden)
            if after_batch is not None:
                after_batch()

    def _call(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return call_layer(layer, hidden, arguments=self._arguments, index=self._at)


@torch.no_grad()
def call_layer(layer: nn.Module, hidden: torch.Tensor, *, arguments: Arguments, index: int) -> torch.Tensor:
    """[B, T, H] -> [B, T, H], as the model calls its layer ``index``."""
    args, kwargs = arguments[index, hidden.shape[:2]]
    output = layer(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


class _Enough(Exception):
    """Ends a forward when all that is wanted was seen."""


@torch.no_grad()
def enter(model: Any, batch: torch.Tensor, arguments: Arguments) -> torch.Tensor:
    """[B, T] int64 token ids -> inputs of the first layer [B, T, H]; for a new shape also every layer's ``arguments``.

    ToolchainError TC-209 when the model has no list of decoder layers.
    """
    _, layers = decoder_layers(model)
    known = (0, batch.shape) in arguments
    found: list[torch.Tensor] = []

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            arguments[index, batch.shape] = (args[1:], rest)
            if index == 0:
                found.append(args[0] if args else kwargs["hidden_states"])
            if known or index + 1 == len(layers):
                raise _Enough

        return hook

    hooks = [
        layer.register_forward_pre_hook(note(index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    try:
        model.base_model(input_ids=batch, use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found[0]


@contextmanager
def _rounded_once(layer: nn.Module) -> Iterator[None]:
    """Weights are fake-quantized here instead of again for every batch; afterwards they are what they were."""
    modules: list[Any] = [
        module
        for module in layer.modules()
        if getattr(module, "weight_quantizer", None) is not None and module.weight_quantizer.is_enabled
    ]
    before = [module.weight.data for module in modules]
    for module in modules:
        module.weight.data = module.weight_quantizer(module.weight).detach()
        module.weight_quantizer.disable()
    try:
        yield
    finally:
        for module, weight in zip(modules, before, strict=True):
            module.weight.data = weight
            module.weight_quantizer.enable()


def _unquantized_copy(layer: nn.Module) -> nn.Module:
    before = copy.deepcopy(layer)
    for module in before.modules():
        for name in ("weight_quantizer", "input_quantizer", "k_bmm_quantizer", "v_bmm_quantizer"):
            quantizer = getattr(module, name, None)
            if quantizer is not None and quantizer.is_enabled:
                quantizer.disable()
    return before


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """(module path, list) of the decoder's layers. ToolchainError when there is no list of that length."""
    found = find_decoder_layers(model)
    if found is not None:
        return found
    raise ToolchainError(
        f"{type(model).__name__} has no list of {model.config.get_text_config().num_hidden_layers} decoder layers",
        hint="use --recipe max, which needs no walk through the layers",
        code="TC-209",
    )
