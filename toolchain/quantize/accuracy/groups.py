"""Which Linears share an input, and which norm may take their channel scale."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from toolchain.families import Family
from toolchain.quantize.accuracy.statistics import InputStatistics


@dataclass(frozen=True)
class Group:
    """Linears that share one input: runtimes run them as one matmul, so they share scales too."""

    paths: tuple[str, ...]
    format: str
    norm: str | None = None
    """The norm that may take their channel scale; None: it is stored beside each."""
    statistics: InputStatistics = field(default_factory=InputStatistics)


def find_groups(model: nn.Module, modules: dict[str, str], family: Family) -> list[Group]:
    """Groups of ``modules`` (module path -> format) in model order.

    A norm folds only when every consumer that the family names is quantized, and to one format.
    """
    groups = [
        Group(paths=tuple(consumers), format=modules[consumers[0]], norm=norm)
        for norm, consumers in _fold_sites(model, family)
        if len({modules.get(path) for path in consumers}) == 1 and consumers[0] in modules
    ]
    folded = {path for group in groups for path in group.paths}
    rest = {path: name for path, name in modules.items() if path not in folded}
    groups += [Group(paths=tuple(paths), format=rest[paths[0]]) for paths in _siblings(rest, family)]
    order = {path: index for index, path in enumerate(modules)}
    return sorted(groups, key=lambda group: order[group.paths[0]])


def _siblings(modules: dict[str, str], family: Family) -> list[list[str]]:
    """Module paths by what one matmul of a runtime reads: q/k/v of one attention, gate/up of one expert."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path in modules:
        parent, _, projection = family.to_checkpoint(path).rpartition(".")
        found.setdefault((parent, family.fused_siblings(projection)), []).append(path)
    return list(found.values())


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
