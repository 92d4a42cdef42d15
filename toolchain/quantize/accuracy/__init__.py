"""Recipes at work: choose channel scales, weight scales and codes after ModelOpt has calibrated the ranges.

One file per ingredient of ``toolchain.recipes``; ``layers.py`` walks the decoder, ``weights.py`` puts them together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from toolchain.core.progress import Progress
from toolchain.families import Family
from toolchain.formats import get_format
from toolchain.plan.types import Plan
from toolchain.quantize import quantizers, scales
from toolchain.quantize.accuracy import arrange, channels, weights
from toolchain.quantize.accuracy.groups import Group, find_groups
from toolchain.quantize.accuracy.layers import Arguments, HeldHidden, LayerWalk, enter
from toolchain.quantize.accuracy.observing import observe, stages
from toolchain.quantize.forward import CalibrationPass
from toolchain.recipes import GRAM_BUDGET_BYTES, Recipe, get_recipe


@dataclass(kw_only=True)
class Applied:
    """What a recipe did to a calibrated model in memory."""

    folded_norms: set[str] = field(default_factory=set)
    """Module paths of norms that took a channel scale: written from memory."""
    packed: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Module path -> suffix -> tensor as stored, where codes were chosen; the module computes on their values."""
    details: dict[str, Any] = field(default_factory=dict)
    """For the manifest."""


def walks(recipe: Recipe, formats: Iterable[str]) -> bool:
    """True when ``recipe`` must see what each layer computes, for modules of some of these formats."""
    return decides(recipe) and any(recipe.for_format(name).walks for name in formats)


def decides(recipe: Recipe) -> bool:
    """True when anything is left to choose after ModelOpt's calibration."""
    return bool(recipe.on("order") or recipe.on("transform")) or weights.chooses_weights(recipe)


MakeWalk = Callable[[bool], LayerWalk]
"""From ``compare`` to the walk through the layers."""


def apply_recipe(
    model: nn.Module,
    modules: dict[str, str],
    plan: Plan,
    family: Family,
    forward: CalibrationPass,
    progress: Progress,
    *,
    make_walk: MakeWalk | None = None,
) -> Applied:
    """Apply ``plan.recipe`` to ``modules`` (module path -> format name) of a calibrated model, in place.

    ``make_walk``: where the layers come one at a time; then it is used whether or not ``modules`` ask for it.
    """
    recipe = get_recipe(plan.recipe, get_format(plan.format))
    applied = Applied()
    if not decides(recipe):
        return applied
    groups = find_groups(model, modules, family)
    work = _Work(
        model, recipe, applied, modules, seed=plan.calibration.seed, hold_zeros=plan.sparsity is not None
    )
    if make_walk is None and not walks(recipe, {group.format for group in groups}):
        for group in progress.track(groups, description=f"recipe {recipe.name}", total=len(groups)):
            work.choose(group)
        return applied
    compare = recipe.on("target") is not None
    walk = make_walk(compare) if make_walk else _walk(model, plan, forward, compare)
    for _ in progress.track(walk, description=f"recipe {recipe.name}, by layer", total=len(walk)):
        inside = [group for group in groups if group.paths[0].startswith(f"{walk.path}.")]
        # Two layers are compared row by row: only tokens that the router sends to an expert are in both.
        with contextlib.nullcontext() if compare else forward.widening.active(f"{walk.path}."):
            work.layer(stages(model, inside, family, walk) if compare else [inside], walk)
        work.share_inputs([path for group in inside for path in group.paths], walk)
    return applied


def _walk(model: nn.Module, plan: Plan, forward: CalibrationPass, compare: bool) -> LayerWalk:
    arguments: Arguments = {}
    hidden = HeldHidden(enter(model, batch.to(forward.device), arguments) for batch in forward.batches)
    return LayerWalk(model, hidden, arguments, compare=compare, counting=counts_on_walk(plan, forward))


def counts_on_walk(
    plan: Plan, forward: CalibrationPass
) -> Callable[[str], contextlib.AbstractContextManager[None]] | None:
    """Where ModelOpt makes no pass over the data, routing is counted on the walk, on every layer as it ships."""
    return None if quantizers.observes_inputs(plan) else forward.counting


@dataclass
class _Work:
    model: nn.Module
    recipe: Recipe
    applied: Applied
    modules: dict[str, str]
    seed: int
    hold_zeros: bool

    def layer(self, parts: list[list[Group]], walk: LayerWalk) -> None:
        """Choose for the groups of one layer, part by part: a later part sees what was chosen for an earlier one."""
        undecided = {path for part in parts for group in part for path in group.paths}
        self.arrange(undecided, walk)
        for part in parts:
            for batch in _batches(self.model, part, 4 if walk.before is not None else 1):
                wanted = [group for group in batch if self.recipe.for_format(group.format).needs_gram]
                if wanted:
                    with _plain_weights(self.model, undecided):
                        observe(self.model, wanted, walk)
                for group in batch:
                    self.choose(group)
                    if walk.before is not None:
                        undecided -= set(group.paths)

    def arrange(self, inside: set[str], walk: LayerWalk) -> None:
        """Before anything is chosen: where channels lie decides about all the rest."""
        formats = {name for name in self.modules.values() if self.recipe.for_format(name).on("order")}
        if not formats:
            return
        mine = {path: name for path, name in self.modules.items() if path in inside}
        with _plain_weights(self.model, inside):
            left = arrange.arrange(self.model, arrange.gated_mlps(mine, self.model, formats), walk, self.seed)
        if left:
            mean = round(sum(left.values()) / len(left), 4)
            self.applied.details.setdefault("arranged", {})[walk.path] = {
                "mlps": len(left),
                "error_left": mean,
            }

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
            self.applied.packed |= weights.choose(self.model, group, recipe, hold_zeros=self.hold_zeros)
        group.statistics.forget_products()

    def share_inputs(self, paths: list[str], walk: LayerWalk) -> None:
        """Channel scales changed the ranges of inputs: let the experts of the layer agree on the largest again."""
        if not self.recipe.on("transform"):
            return
        quantizers = {path: self.model.get_submodule(path).input_quantizer for path in paths}
        before = {
            path: quantizer.amax.clone()
            for path, quantizer in quantizers.items()
            if quantizer.amax is not None
        }
        scales.share_expert_inputs(self.model.get_submodule(walk.path))
        for path, tensors in self.applied.packed.items():
            if path in quantizers and "input_scale" in tensors:
                ratio = quantizers[path].amax.float() / before[path].float()
                tensors["input_scale"] = tensors["input_scale"] * ratio.reshape(())


@contextlib.contextmanager
def _plain_weights(model: nn.Module, paths: set[str]) -> Iterator[None]:
    """Weight quantizers of modules that nothing was chosen for yet are off: they are observed as they are."""
    quantizers: list[Any] = [model.get_submodule(path).weight_quantizer for path in paths]
    enabled = [quantizer for quantizer in quantizers if quantizer.is_enabled]
    for quantizer in enabled:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in enabled:
            quantizer.enable()


def _batches(model: nn.Module, groups: list[Group], matrices: int) -> list[list[Group]]:
    """Groups whose products (``matrices`` per input) fit into ``GRAM_BUDGET_BYTES`` together."""
    batches: list[list[Group]] = [[]]
    used = 0
    for group in groups:
        size = 4 * matrices * int(model.get_submodule(group.paths[0]).in_features) ** 2
        if batches[-1] and used + size > GRAM_BUDGET_BYTES:
            batches.append([])
            used = 0
        batches[-1].append(group)
        used += size
    return batches


__all__ = ["Applied", "MakeWalk", "apply_recipe", "counts_on_walk", "decides", "walks"]
