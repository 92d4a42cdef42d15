"""The decoder from one layer onward: what changes when only that layer changes.

The inputs of the layer at hand are kept for all held-out tokens, so a group of layer l costs the layers l, l+1, ...
and not the whole model; the baseline is kept as the hidden states before the output head, not as logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from toolchain.core.errors import ToolchainError
from toolchain.evaluate.divergence import token_kl
from toolchain.quantize.accuracy.layers import decoder_layers

ROWS = 256
"""Positions whose distributions are held in float64 at a time."""


@torch.no_grad()
def head_inputs(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """What the output head gets for ``batch`` [B, T]: hidden states [B, T, H] behind the final norm."""
    found: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        model(input_ids=batch, use_cache=False)
    finally:
        hook.remove()
    return found[0]


class Baseline:
    """Next-token distributions of the unquantized model on the held-out windows, as hidden states and a head."""

    def __init__(self, hidden: list[torch.Tensor], head: Any) -> None:
        self.hidden = hidden
        """Per batch [B, T, H], behind the final norm."""
        self._weight, self._bias = head.weight.data, head.bias

    def logits(self, index: int) -> torch.Tensor:
        """[B, T, V] of batch ``index``."""
        return linear(self.hidden[index], self._weight, self._bias)

    @torch.no_grad()
    def kl(self, index: int, logits: torch.Tensor) -> torch.Tensor:
        """KL(baseline || quantized) in nats, [B, T - 1] float64: of every token but the first of its window."""
        reference = self.logits(index)[:, :-1]
        rows, others = reference.flatten(0, 1), logits[:, :-1].flatten(0, 1)
        parts = [
            token_kl(mine, theirs) for mine, theirs in zip(others.split(ROWS), rows.split(ROWS), strict=True)
        ]
        return torch.cat(parts).reshape(reference.shape[:2]).cpu()


class Tail:
    """``for layer in tail:`` change something in that layer, ask ``kl()``, and change it back."""

    def __init__(self, model: Any, batches: list[torch.Tensor]) -> None:
        """``batches``: [B, T] int64 on the model's device. ToolchainError TC-209, TC-222 for models without a plain
        list of layers, a final norm and a head."""
        prefix, self._layers = decoder_layers(model)
        self._norm: Any = getattr(model.get_submodule(prefix.rpartition(".")[0]), "norm", None)
        self._head = model.get_output_embeddings()
        self._arguments: dict[tuple[int, torch.Size], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._at = 0
        self._first: list[torch.Tensor] = []
        _refuse_other_heads(model, self._norm, self._head)
        self.baseline = Baseline([self._enter(model, batch) for batch in batches], self._head)
        self._hidden = self._first
        self._refuse_other_ways(model, batches[0])

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[int]:
        """Indices of the layers, then ``len(self)``: behind the last layer, where only the head is left."""
        for index in range(len(self._layers)):
            self._at = index
            yield index
            self._hidden = [self._call(index, hidden) for hidden in self._hidden]
        self._at = len(self._layers)
        yield self._at

    def kl(self) -> torch.Tensor:
        """[windows, T - 1] of the model as it is now, from the layer at hand onward."""
        return torch.cat([self.baseline.kl(index, logits) for index, logits in enumerate(self._logits())])

    @torch.no_grad()
    def _logits(self) -> Iterator[torch.Tensor]:
        for hidden in self._hidden:
            for index in range(self._at, len(self._layers)):
                hidden = self._call(index, hidden)
            yield self._head(self._norm(hidden))

    @torch.no_grad()
    def _call(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._arguments[index, hidden.shape[:2]]
        output = self._layers[index](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def _enter(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] before the head; notes the first layer's inputs and every layer's arguments."""

        def note(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                self._arguments[index, batch.shape] = (args[1:], rest)
                if index == 0:
                    self._first.append(args[0] if args else kwargs["hidden_states"])

            return hook

        hooks = [
            layer.register_forward_pre_hook(note(index), with_kwargs=True)
            for index, layer in enumerate(self._layers)
        ]
        try:
            return head_inputs(model, batch)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _refuse_other_ways(self, model: Any, batch: torch.Tensor) -> None:
        """Layer by layer must be what the model computes: some do more between or behind their layers."""
        own = model(input_ids=batch, use_cache=False).logits
        walked = next(self._logits())
        if not torch.allclose(own.float(), walked.float(), rtol=1e-2, atol=1e-2):
            raise ToolchainError(
                f"{type(model).__name__} computes other logits than its layers, norm and head one after the other "
                f"(they differ by {float((own - walked).abs().max()):.3g})",
                hint="sensitivity is not measured for this architecture; --auto-method gradient needs no walk",
                code="TC-222",
            )


def _refuse_other_heads(model: Any, norm: Any, head: Any) -> None:
    if norm is None or head is None:
        raise ToolchainError(
            f"{type(model).__name__} has no final norm beside its layers, or no output head",
            hint="sensitivity is not measured for this architecture",
            code="TC-222",
        )
