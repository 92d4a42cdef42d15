"""Which Linears share an input, and which norm may take their AWQ scale; and the search over all of them in memory
that fits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from toolchain.core.progress import Progress
from toolchain.families import Family
from toolchain.quantize.accuracy import awq
from toolchain.quantize.quantizers import fused_groups

GRAM_BUDGET_BYTES = 4 * 1024**3
"""Gram matrices held at once; a model that needs more is searched in several passes over the data."""


def find_groups(model: nn.Module, modules: dict[str, str], family: Family) -> list[awq.Group]:
    """Groups in model order. A norm folds only when every consumer that the family names is quantized."""
    groups = [
        awq.Group(paths=tuple(consumers), norm=norm)
        for norm, consumers in _fold_sites(model, family)
        if all(path in modules for path in consumers)
    ]
    folded = {path for group in groups for path in group.paths}
    rest = {path: name for path, name in modules.items() if path not in folded}
    groups += [awq.Group(paths=tuple(paths)) for paths in fused_groups(rest, family)]
    order = {path: index for index, path in enumerate(modules)}
    return sorted(groups, key=lambda group: order[group.paths[0]])


def _fold_sites(model: nn.Module, family: Family) -> list[tuple[str, list[str]]]:
    present = {path for path, _ in model.named_modules()}
    layers = [path for path in present if path.rpartition(".")[0].endswith("layers")]
    sites = []
    for layer in layers:
        for norm, consumers in family.norm_folds:
            paths = [f"{layer}.{name}" for name in consumers if f"{layer}.{name}" in present]
            if f"{layer}.{norm}" in present and paths:
                sites.append((f"{layer}.{norm}", paths))
    return sites


@torch.no_grad()
def run(
    model: nn.Module, modules: dict[str, str], family: Family, forward: Callable[[], None], progress: Progress
) -> tuple[dict[str, float], set[str]]:
    """Search and apply AWQ scales; returns module path -> alpha, and the norms that took a scale.

    Modules whose input no token reached get scale 1 (they are rounded to nearest; runtimes want the tensor of every
    expert) and have no alpha. A pass after the first sees scaled weights, but the same activations within rounding:
    x / s and W * s cancel.
    """
    groups = find_groups(model, modules, family)
    alphas: dict[str, float] = {}
    batches = _batches(model, groups)
    for number, batch in enumerate(batches, start=1):
        progress.note(f"AWQ statistics, pass {number} of {len(batches)} ({len(batch)} inputs)")
        with _unquantized(model):
            awq.collect(model, batch, forward)
        for group in progress.track(batch, description="AWQ search", total=len(batch)):
            weights = [model.get_submodule(path).weight.data for path in group.paths]
            if group.statistics.tokens:
                scale, alpha = awq.search(weights, group.statistics)
                alphas |= dict.fromkeys(group.paths, alpha)
            else:
                scale = torch.ones(weights[0].shape[1], device=weights[0].device)
            awq.apply(model, group, scale)
            group.statistics.gram = None
    return alphas, {group.norm for group in groups if group.norm}


def _unquantized(model: nn.Module) -> AbstractContextManager[None]:
    """All quantizers off: AWQ measures the activations of the model that it wants to preserve."""
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg_context

    return set_quantizer_by_cfg_context(model, [{"quantizer_name": "*", "enable": False}])


def _batches(model: nn.Module, groups: list[awq.Group]) -> list[list[awq.Group]]:
    batches: list[list[awq.Group]] = [[]]
    used = 0
    for group in groups:
        size = 4 * int(model.get_submodule(group.paths[0]).in_features) ** 2
        if batches[-1] and used + size > GRAM_BUDGET_BYTES:
            batches.append([])
            used = 0
        batches[-1].append(group)
        used += size
    return batches
