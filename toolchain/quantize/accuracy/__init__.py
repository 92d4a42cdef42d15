"""Recipes at work: choose channel scales, weight scales and codes after ModelOpt has calibrated the ranges.

One file per ingredient of ``toolchain.recipes``; ``layers.py`` walks the decoder, ``weights.py`` puts them together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from toolchain.core.progress import Progress
from toolchain.families import Family
from toolchain.formats import get_format
from toolchain.plan.types import Plan
from toolchain.quantize import scales
from toolchain.quantize.accuracy import channels, weights
from toolchain.quantize.accuracy.groups import Group, find_groups
from toolchain.quantize.accuracy.layers import LayerWalk
from toolchain.quantize.accuracy.statistics import observe
from toolchain.quantize.forward import CalibrationPass
from toolchain.recipes import Recipe, get_recipe

GRAM_BUDGET_BYTES = 4 * 1024**3
"""Gram matrices held at once; a layer that needs more is observed several times."""


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
    forward: CalibrationPass,
    progress: Progress,
) -> Applied:
    """Apply ``plan.recipe`` to ``modules`` (module path -> format name) of a calibrated model, in place."""
    recipe = get_recipe(plan.recipe, get_format(plan.format))
    applied = Applied()
    if not recipe.on("transform") and not weights.chooses_weights(recipe):
        return applied
    groups = find_groups(model, modules, family)
    work = _Work(model, recipe, applied)
    if not any(weights.needs_gram(recipe.for_format(group.format)) for group in groups):
        for group in progress.track(groups, description=f"recipe {recipe.name}", total=len(groups)):
            work.choose(group)
        return applied
    walk = LayerWalk(model, forward.batches, forward.device)
    with forward.widening.active():
        for _ in progress.track(walk, description=f"recipe {recipe.name}, by layer", total=len(walk)):
            inside = [group for group in groups if group.paths[0].startswith(f"{walk.path}.")]
            for batch in _batches(model, inside):
                work.observe(batch, walk)
                for group in batch:
                    work.choose(group)
            work.share_inputs([path for group in inside for path in group.paths], walk)
    return applied


@dataclass
class _Work:
    model: nn.Module
    recipe: Recipe
    applied: Applied

    def observe(self, groups: list[Group], walk: LayerWalk) -> None:
        """Fill the statistics of ``groups`` by one pass through the layer at hand."""
        hooks = []
        for group in groups:
            recipe = self.recipe.for_format(group.format)
            if weights.needs_gram(recipe):
                cross = recipe.on("target") is not None
                module = self.model.get_submodule(group.paths[0])
                hooks.append(observe(module, group.statistics, rounded=cross, gram=True, cross=cross))
        try:
            with _plain_weights(self.model.get_submodule(walk.path)):
                walk.run()
        finally:
            for hook in hooks:
                hook.remove()

    def choose(self, group: Group) -> None:
        recipe = self.recipe.for_format(group.format)
        method = recipe.on("transform")
        if method:
            alpha = channels.transform(self.model, group, method)
            if alpha is not None:
                self.applied.details.setdefault(f"{method}_alpha", {}).update(
                    dict.fromkeys(group.paths, alpha)
                )
            if group.norm:
                self.applied.folded_norms.add(group.norm)
        if weights.chooses_weights(recipe):
            self.applied.packed |= weights.choose(self.model, group, recipe)
        group.statistics.gram = group.statistics.cross = None

    def share_inputs(self, paths: list[str], walk: LayerWalk) -> None:
        """Channel scales changed the ranges of inputs: let the experts of the layer agree on the largest again."""
        if not self.recipe.on("transform"):
            return
        quantizers = {path: self.model.get_submodule(path).input_quantizer for path in paths}
        before = {path: quantizer.amax for path, quantizer in quantizers.items()}
        scales.share_expert_inputs(self.model.get_submodule(walk.path))
        for path, tensors in self.applied.packed.items():
            if path in quantizers and "input_scale" in tensors:
                ratio = quantizers[path].amax.float() / before[path].float()
                tensors["input_scale"] = tensors["input_scale"] * ratio.reshape(())


class _plain_weights:
    """Weight quantizers of a layer off: it is observed as it is, on inputs that have passed the layers before."""

    def __init__(self, layer: nn.Module) -> None:
        quantizers = [getattr(module, "weight_quantizer", None) for module in layer.modules()]
        self._enabled: list[Any] = [item for item in quantizers if item is not None and item.is_enabled]

    def __enter__(self) -> None:
        for quantizer in self._enabled:
            quantizer.disable()

    def __exit__(self, *exception: object) -> None:
        for quantizer in self._enabled:
            quantizer.enable()


def _batches(model: nn.Module, groups: list[Group]) -> list[list[Group]]:
    """Groups whose Gram matrices fit into ``GRAM_BUDGET_BYTES`` together."""
    batches: list[list[Group]] = [[]]
    used = 0
    for group in groups:
        size = 4 * int(model.get_submodule(group.paths[0]).in_features) ** 2
        if batches[-1] and used + size > GRAM_BUDGET_BYTES:
            batches.append([])
            used = 0
        batches[-1].append(group)
        used += size
    return batches


__all__ = ["Applied", "apply_recipe"]
