"""A Recipe says how scales and codes are chosen within a format. Declarations only: no torch here.

The stored layout is the format's in every case: a recipe changes accuracy and the time that quantization takes, never
what a runtime must be able to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Axis = Literal["order", "transform", "target", "scales", "rounding", "inputs"]
"""What an ingredient decides: where channels lie, how they are rescaled before quantization, which weights rounding
aims at, how weight scales are chosen, how codes are rounded, and how input scales follow from the calibrated range. A
recipe has at most one ingredient per axis."""

AXES: tuple[Axis, ...] = ("order", "transform", "target", "scales", "rounding", "inputs")

GRAM_BUDGET_BYTES = 4 * 1024**3
"""Gram matrices ([K, K] float32 per input) held at once; a layer that needs more is observed several times."""

SAMPLE_TOKENS = 512
"""Inputs of one MLP that an order of its channels is chosen by, at most four times as many held until all came: on the
demo twice as many won nothing."""


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    name: str
    title: str
    axis: Axis
    formats: tuple[str, ...]
    """Formats whose numbers it can choose."""
    needs_data: bool = True
    """False when weights alone decide."""
    needs_moments: bool = True
    """Of those that need data: False when second moments of the inputs do not tell its error."""
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
    def walks(self) -> bool:
        """True when errors are those of outputs: every layer is looked at on what the layers before it ship."""
        return any(item.needs_data and item.axis != "inputs" for item in self.ingredients)

    @property
    def needs_gram(self) -> bool:
        """True when the second moments of every input are collected on that walk."""
        return any(
            item.needs_data and item.axis != "inputs" and item.needs_moments for item in self.ingredients
        )

    def on(self, axis: Axis) -> str | None:
        """Name of the ingredient that decides ``axis``; None for the plain way."""
        return next((item.name for item in self.ingredients if item.axis == axis), None)

    def for_format(self, format_name: str) -> Recipe:
        """What of it applies to one format of a mixed plan."""
        return Recipe(ingredients=tuple(item for item in self.ingredients if format_name in item.formats))
