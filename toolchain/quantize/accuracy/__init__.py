"""Recipes at work: choose channel scales, weight scales and codes after ModelOpt has calibrated the ranges.

One file per ingredient of ``toolchain.recipes``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from toolchain.core.progress import Progress
from toolchain.families import Family
from toolchain.formats import get_format
from toolchain.plan.types import Plan
from toolchain.quantize.accuracy import awq_groups
from toolchain.recipes import get_recipe


@dataclass(kw_only=True)
class Applied:
    """What a recipe did to a calibrated model in memory."""

    folded_norms: set[str] = field(default_factory=set)
    """Module paths of norms that took a channel scale: written from memory."""
    packed: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Module path -> suffix -> tensor as stored, where codes were chosen; the module computes on their values."""
    details: dict[str, Any] = field(default_factory=dict)
    """For the manifest."""


def apply_recipe(
    model: nn.Module,
    modules: dict[str, str],
    plan: Plan,
    family: Family,
    forward: Callable[[], None],
    progress: Progress,
) -> Applied:
    """Apply ``plan.recipe`` to ``modules`` (module path -> format name) of a calibrated model, in place."""
    recipe = get_recipe(plan.recipe, get_format(plan.format))
    applied = Applied()
    if recipe.on("transform") == "awq":
        alphas, applied.folded_norms = awq_groups.run(model, modules, family, forward, progress)
        applied.details["awq_alpha"] = alphas
    return applied


__all__ = ["Applied", "apply_recipe"]
