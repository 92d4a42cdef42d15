"""What the tokens that reach one input say about it: sums from which every recipe computes its error exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class InputStatistics:
    """Sums over the tokens that reached one input x [K]. x~ is the input that the shipped layer will compute on, where
    a recipe tells both apart; else x itself."""

    tokens: int = 0
    absolute: torch.Tensor | None = None
    """[K] sum of |x|, float32."""
    largest: torch.Tensor | None = None
    """[K] largest |x|, float32."""
    gram: torch.Tensor | None = None
    """[K, K] sum of x~^T x~, float32."""
    cross: torch.Tensor | None = None
    """[K, K] sum of x^T x~, float32; None where x~ is x."""

    def add(self, x: torch.Tensor, shipped: torch.Tensor | None = None) -> None:
        """Add [..., K] activations, with x~ for the same tokens if it differs."""
        rows = x.detach().flatten(0, -2).float()
        if not len(rows):
            return
        self.tokens += len(rows)
        magnitude = rows.abs()
        self.absolute = _plus(self.absolute, magnitude.sum(0))
        peak = magnitude.amax(0)
        self.largest = peak if self.largest is None else torch.maximum(self.largest, peak)
        other = rows if shipped is None else shipped.detach().flatten(0, -2).float()
        self.gram = _plus(self.gram, other.T @ other)
        if shipped is not None:
            self.cross = _plus(self.cross, rows.T @ other)

    def rescale(self, factor: torch.Tensor) -> None:
        """The input is multiplied by ``factor`` [K] from now on."""
        if self.absolute is not None and self.largest is not None:
            self.absolute, self.largest = self.absolute * factor, self.largest * factor
        if self.gram is not None:
            self.gram = self.gram * factor * factor.unsqueeze(-1)
        if self.cross is not None:
            self.cross = self.cross * factor * factor.unsqueeze(-1)

    def forget_products(self) -> None:
        """Free the matrices; counts and magnitudes stay."""
        self.gram = self.cross = None


def _plus(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if total is None else total.add_(more)
