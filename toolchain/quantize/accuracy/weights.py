"""Choose scales and codes of one group of Linears, and leave the modules computing on what will be stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from toolchain.codecs import get_codec
from toolchain.quantize import scales as calibrated_scales
from toolchain.quantize.accuracy import compensate, gptq
from toolchain.quantize.accuracy.grids import Grid, grid_of
from toolchain.quantize.accuracy.groups import Group
from toolchain.quantize.accuracy.scale_search import block_hessian, choose_scales
from toolchain.recipes import Recipe

WITHOUT_DATA = {"local_hessian": "window", "clip": "max"}
"""What stands in for a search by output error where no token reached the input."""


def chooses_weights(recipe: Recipe) -> bool:
    """True when the recipe decides more about weights than their largest magnitude does."""
    return any(recipe.on(axis) for axis in ("target", "scales", "rounding"))


@torch.no_grad()
def choose(
    model: nn.Module, group: Group, recipe: Recipe, *, hold_zeros: bool = False
) -> dict[str, dict[str, torch.Tensor]]:
    """Module path -> tensors as stored, for the modules of ``group``. Their weights become what the tensors hold.

    ``hold_zeros``: weights that are zero stay zero, whatever the recipe.
    """
    modules: list[Any] = [model.get_submodule(path) for path in group.paths]
    amax = torch.stack([_weight_amax(module) for module in modules]).amax()
    weight = torch.cat([module.weight.float() for module in modules])
    grid = grid_of(group.format, amax, weight.shape[1])
    rows = [len(module.weight) for module in modules]
    kept = weight != 0 if hold_zeros else None
    values, scales = _values_and_scales(weight, rows, grid, group, recipe, kept)
    codec, packed = get_codec(group.format), {}
    for path, module, part, scale in zip(
        group.paths, modules, values.split(rows), scales.split(rows), strict=True
    ):
        found = calibrated_scales.calibrated(module, path, needs_input=codec.format.has_input_scale)
        found = replace(found, weight_amax=amax, weight_scale=grid.stored(scale))
        packed[path] = codec.pack(part, found)
        module.weight.data = codec.unpack(packed[path], module.weight.dtype)
        module.weight_quantizer.disable()
    return packed


def _values_and_scales(
    weight: torch.Tensor,
    rows: list[int],
    grid: Grid,
    group: Group,
    recipe: Recipe,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> (values to encode, scales). ``rows``: of each Linear. Without tokens what weights alone decide.

    ``kept`` as in ``gptq.solve``; the plan refuses ``target`` beside it.
    """
    statistics, method, hessian = group.statistics, recipe.on("scales"), None
    gram = statistics.gram
    if recipe.on("target") and gram is not None:
        weight = compensate.compensated(weight, statistics)
    if method in WITHOUT_DATA:
        if gram is not None:
            hessian = block_hessian(gram, grid.group)
        else:
            method = WITHOUT_DATA[method]
    if method in (None, "max"):
        chosen = torch.cat([grid.base(part) for part in weight.split(rows)])
    else:
        chosen = choose_scales(weight, grid, method, hessian)
    if not recipe.on("rounding") or gram is None:
        return weight, chosen
    factors = grid.factors(chosen).repeat_interleave(grid.group, dim=-1)[:, : weight.shape[1]]
    return gptq.solve(weight, factors, gram / statistics.tokens, grid.round, kept=kept), chosen


def _weight_amax(module: Any) -> torch.Tensor:
    """What the fused siblings agreed on where the format has one scale per tensor; else the weight's own."""
    quantizer = module.weight_quantizer
    amax = getattr(quantizer, "amax", None)
    if amax is not None and amax.numel() == 1:
        return amax.reshape(()).float()
    return module.weight.abs().amax().float()
