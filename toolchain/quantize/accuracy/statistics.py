"""What the tokens that reach one input say about it: sums from which every recipe computes its error exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class InputStatistics:
    """Sums over the tokens that reached one input x [K]. x~ is x as the target rounds it, or x itself."""

    tokens: int = 0
    absolute: torch.Tensor | None = None
    """[K] sum of |x|, float32."""
    largest: torch.Tensor | None = None
    """[K] largest |x|, float32."""
    gram: torch.Tensor | None = None
    """[K, K] sum of x~^T x~, float32."""
    cross: torch.Tensor | None = None
    """[K, K] sum of x^T x~, float32; None unless asked for."""

    def add(
        self, x: torch.Tensor, rounding: Rounding | None = None, *, gram: bool = True, cross: bool = False
    ) -> None:
        """Add [..., K] activations."""
        rows = x.detach().flatten(0, -2)
        if not len(rows):
            return
        self.tokens += len(rows)
        rounded = (rounding(rows) if rounding else rows).float()
        rows = rows.float()
        magnitude = rows.abs()
        self.absolute = _plus(self.absolute, magnitude.sum(0))
        peak = magnitude.amax(0)
        self.largest = peak if self.largest is None else torch.maximum(self.largest, peak)
        if gram:
            self.gram = _plus(self.gram, rounded.T @ rounded)
        if cross:
            self.cross = _plus(self.cross, rows.T @ rounded)

    def rescale(self, factor: torch.Tensor) -> None:
        """The input is multiplied by ``factor`` [K] from now on."""
        if self.absolute is not None and self.largest is not None:
            self.absolute, self.largest = self.absolute * factor, self.largest * factor
        if self.gram is not None:
            self.gram = self.gram * factor * factor.unsqueeze(-1)
        if self.cross is not None:
            self.cross = self.cross * factor * factor.unsqueeze(-1)


def _plus(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if total is None else total.add_(more)


def observe(module: Any, statistics: InputStatistics, *, rounded: bool, gram: bool, cross: bool) -> Any:
    """A hook on ``module`` that adds its inputs. ``rounded``: as its input quantizer rounds them."""

    def add(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        quantizer = getattr(module, "input_quantizer", None)
        rounding = quantizer if rounded and quantizer is not None and quantizer.is_enabled else None
        statistics.add(args[0], rounding, gram=gram, cross=cross)

    return module.register_forward_pre_hook(add)
