"""A Recipe says how scales and codes are chosen within a format. Declarations only: no torch here.

The stored layout is the format's in every case: a recipe changes accuracy and the time that quantization takes, never
what a runtime must be able to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Axis = Literal["transform", "target", "scales", "rounding", "inputs"]
"""What an ingredient decides: how channels are rescaled before quantization, which weights rounding aims at, how
weight scales are chosen, how codes are rounded, and how input scales follow from the calibrated range. A recipe has at
most one ingredient per axis."""

AXES: tuple[Axis, ...] = ("transform", "target", "scales", "rounding", "inputs")

GRAM_BUDGET_BYTES = 4 * 1024**3
"""Gram matrices ([K, K] float32 per input) held at once; a layer that needs more is observed several times."""


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    name: str
    title: str
    axis: Axis
    formats: tuple[str, ...]
    """Formats whose numbers it can choose."""
    needs_data: bool = True
    """False when weights alone decide."""
    source: str = ""
    """Paper or ModelOpt algorithm."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ingredients in the order of their axes. Without any: largest magnitude, rounded to nearest."""

    ingredients: tuple[Ingredient, ...] = ()

    @property
    def name(self) -> str:
        """``awq+window+gptq``; ``max`` for none."""
        return "+".join(item.name for item in self.ingredients) or "max"

    @property
    def needs_data(self) -> bool:
        return any(item.needs_data for item in self.ingredients)

    @property
    def needs_gram(self) -> bool:
        """True when errors are those of outputs: the second moments of every input are collected, layer by layer."""
        return any(item.needs_data and item.axis != "inputs" for item in self.ingredients)

    def on(self, axis: Axis) -> str | None:
        """Name of the ingredient that decides ``axis``; None for the plain way."""
        return next((item.name for item in self.ingredients if item.axis == axis), None)

    def for_format(self, format_name: str) -> Recipe:
        """What of it applies to one format of a mixed plan."""
        return Recipe(ingredients=tuple(item for item in self.ingredients if format_name in item.formats))
