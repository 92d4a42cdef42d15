"""What the tokens that reach one input say about it: sums from which every recipe computes its error exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Products:
    """Second moments over some of the tokens."""

    gram: torch.Tensor | None = None
    """[K, K] sum of x~^T x~, float32."""
    cross: torch.Tensor | None = None
    """[K, K] sum of x^T x~, float32; None where x~ is x."""

    def add(self, rows: torch.Tensor, shipped: torch.Tensor | None) -> None:
        other = rows if shipped is None else shipped
        self.gram = _plus(self.gram, other.T @ other)
        if shipped is not None:
            self.cross = _plus(self.cross, rows.T @ other)

    def rescale(self, factor: torch.Tensor) -> None:
        if self.gram is not None:
            self.gram = self.gram * factor * factor.unsqueeze(-1)
        if self.cross is not None:
            self.cross = self.cross * factor * factor.unsqueeze(-1)


@dataclass
class InputStatistics:
    """Sums over the tokens that reached one input x [K]. x~ is the input that the shipped layer will compute on, where
    a recipe tells both apart; else x itself."""

    tokens: int = 0
    absolute: torch.Tensor | None = None
    """[K] sum of |x|, float32."""
    peaks: list[torch.Tensor | None] = field(default_factory=lambda: [None, None])
    """[K] largest |x| of the first and of the second half of every batch, float32: how far one half of the tokens
    exceeds the other tells how far new tokens will."""
    halves: tuple[Products, Products] = field(default_factory=lambda: (Products(), Products()))
    """The first and the second half of every batch, where x~ differs from x: what one half of the tokens suggests is
    tested on the other. All of them in the first where it does not."""

    @property
    def largest(self) -> torch.Tensor | None:
        """[K] largest |x|, float32; None when there were no tokens."""
        found = [peak for peak in self.peaks if peak is not None]
        return torch.stack(found).amax(0) if found else None

    @property
    def gram(self) -> torch.Tensor | None:
        """[K, K] sum of x~^T x~ over all tokens; None when there were none."""
        found = [half.gram for half in self.halves if half.gram is not None]
        return found[0] + found[1] if len(found) == 2 else (found[0] if found else None)

    def add(self, x: torch.Tensor, shipped: torch.Tensor | None = None) -> None:
        """Add one batch of [..., K] activations, with x~ for the same tokens if it differs."""
        rows = x.detach().flatten(0, -2).float()
        if not len(rows):
            return
        self.tokens += len(rows)
        magnitude = rows.abs()
        self.absolute = _plus(self.absolute, magnitude.sum(0))
        middle = len(rows) // 2
        for half, part in enumerate((magnitude[:middle], magnitude[middle:])):
            if len(part):
                self._add_peak(half, part.amax(0))
        if shipped is None:
            self.halves[0].add(rows, None)
            return
        other = shipped.detach().flatten(0, -2).float()
        self.halves[0].add(rows[:middle], other[:middle])
        self.halves[1].add(rows[middle:], other[middle:])

    def _add_peak(self, half: int, peak: torch.Tensor) -> None:
        known = self.peaks[half]
        self.peaks[half] = peak if known is None else torch.maximum(known, peak)

    def rescale(self, factor: torch.Tensor) -> None:
        """The input is multiplied by ``factor`` [K] from now on."""
        if self.absolute is not None:
            self.absolute = self.absolute * factor
        self.peaks = [None if peak is None else peak * factor for peak in self.peaks]
        for half in self.halves:
            half.rescale(factor)

    def forget_products(self) -> None:
        """Free the matrices; counts and magnitudes stay."""
        self.halves = (Products(), Products())


def _plus(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if total is None else total.add_(more)
