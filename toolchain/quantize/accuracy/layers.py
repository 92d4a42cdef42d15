"""Walk a decoder layer by layer: every layer sees the outputs of the layers before it as they will ship.

One pass over the data for the inputs of the first layer, then two per layer: one that observes, one that computes the
inputs of the next. Only one layer's statistics are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from toolchain.core.errors import ToolchainError


class _Enough(Exception):
    """Ends a forward at the first layer: its inputs are all that is wanted."""


class LayerWalk:
    """``for layer in walk:`` observe it with ``run()``, change it, and its successor sees the changed outputs."""

    def __init__(self, model: Any, batches: list[torch.Tensor], device: torch.device) -> None:
        """``batches``: [B, T] int64 token ids. ToolchainError when the model has no list of decoder layers."""
        self.prefix, self._layers = decoder_layers(model)
        self._arguments: dict[tuple[int, torch.Size], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._hidden = [self._enter(model, batch.to(device)) for batch in batches]
        self._at = 0

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def path(self) -> str:
        """Module path of the layer at hand."""
        return f"{self.prefix}.{self._at}"

    def __iter__(self) -> Iterator[nn.Module]:
        for index, layer in enumerate(self._layers):
            self._at = index
            yield layer
            self._hidden = list(self._outputs())

    def run(self) -> None:
        """Send all inputs through the layer at hand; its outputs are dropped. For hooks."""
        for _ in self._outputs():
            pass

    @torch.no_grad()
    def _outputs(self) -> Iterator[torch.Tensor]:
        layer = self._layers[self._at]
        for hidden in self._hidden:
            args, kwargs = self._arguments[self._at, hidden.shape[:2]]
            output = layer(hidden, *args, **kwargs)
            yield output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def _enter(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        """Inputs of the first layer [B, T, H]; for a new shape also the other arguments of every layer."""
        known = (0, batch.shape) in self._arguments
        found: list[torch.Tensor] = []

        def note(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                self._arguments[index, batch.shape] = (args[1:], rest)
                if index == 0:
                    found.append(args[0] if args else kwargs["hidden_states"])
                    if known:
                        raise _Enough

            return hook

        hooks = [
            layer.register_forward_pre_hook(note(index), with_kwargs=True)
            for index, layer in enumerate(self._layers)
        ]
        try:
            model.base_model(input_ids=batch, use_cache=False)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return found[0]


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """(module path, list) of the decoder's layers. ToolchainError when there is no list of that length."""
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and path.endswith("layers") and len(module) == count:
            return path, module
    raise ToolchainError(
        f"{type(model).__name__} has no list of {count} decoder layers",
        hint="use --recipe max, which needs no walk through the layers",
        code="TC-208",
    )
