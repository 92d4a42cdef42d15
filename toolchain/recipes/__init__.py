"""Recipes: how scales and codes are chosen within a format. A new ingredient is one entry in ``INGREDIENTS``."""

from __future__ import annotations

from toolchain.core.errors import UsageError
from toolchain.core.lookup import pick
from toolchain.formats.base import Format
from toolchain.recipes.base import AXES, GRAM_BUDGET_BYTES, SAMPLE_TOKENS, Axis, Ingredient, Recipe
from toolchain.recipes.best import BEST
from toolchain.recipes.ingredients import INGREDIENTS

MAX = "max"
"""The recipe without ingredients: scales from the largest magnitude, rounding to nearest."""


def get_recipe(text: str | None, format: Format) -> Recipe:
    """``default``, ``best``, ``max``, or ingredients joined by ``+`` -> the resolved recipe for ``format``.

    None means ``default``: what the format's own name promises (AWQ for int4_awq), else ``max``. UsageError TC-108 for
    an unknown ingredient, for two on one axis, and for one that the format has no use for.
    """
    text = text or "default"
    if text == "default":
        text = format.default_recipe
    elif text == "best":
        text = BEST.get(format.name, format.default_recipe)
    names = [] if text == MAX else text.split("+")
    found = [_ingredient(name) for name in names]
    for item in found:
        if format.name not in item.formats:
            fitting = [other.name for other in INGREDIENTS if format.name in other.formats]
            raise UsageError(
                f"recipe {item.name} does not apply to {format.name}",
                hint=f"for {format.name}: {', '.join(['max', *fitting])}; join several with +",
                code="TC-108",
            )
    for axis in AXES:
        same = [item.name for item in found if item.axis == axis]
        if len(same) > 1:
            raise UsageError(
                f"recipe {text}: {' and '.join(same)} both decide the {axis}",
                hint="keep one of them",
                code="TC-108",
            )
    return Recipe(ingredients=tuple(sorted(found, key=lambda item: AXES.index(item.axis))))


def is_recipe_file(text: str | None) -> bool:
    """True for a YAML file or a name in ModelOpt's library (``general/ptq/...``), which are no ingredients: they say
    which part gets which format too (``toolchain.quantize.recipe_file``)."""
    return bool(text) and (str(text).endswith((".yaml", ".yml")) or "/" in str(text))


def _ingredient(name: str) -> Ingredient:
    return pick(
        INGREDIENTS,
        name,
        kind="recipe",
        hint="`default`, `best`, `max`, or names joined by + (`toolchain list recipes`)",
        code="TC-108",
    )


__all__ = [
    "AXES",
    "BEST",
    "GRAM_BUDGET_BYTES",
    "INGREDIENTS",
    "MAX",
    "SAMPLE_TOKENS",
    "Axis",
    "Ingredient",
    "Recipe",
    "get_recipe",
    "is_recipe_file",
]
