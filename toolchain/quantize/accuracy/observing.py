"""Fill the statistics of groups from what one layer computes, alone or beside the layer that it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from toolchain.families import Family
from toolchain.modeling.experts import UnfusedExperts
from toolchain.quantize.accuracy.groups import Group
from toolchain.quantize.accuracy.layers import LayerWalk


def observe(model: nn.Module, groups: list[Group], walk: LayerWalk) -> None:
    """One pass over the data through the layer at hand. With ``walk.before`` x is the input in that layer and x~ the
    rounded input in the one that ships, on the tokens that the latter routes to an expert."""
    layer = model.get_submodule(walk.path)
    with ExitStack() as stack:
        if walk.before is None:
            for group in groups:
                stack.enter_context(_hook(model.get_submodule(group.paths[0]), group.statistics.add))
            walk.run()
            return
        pairs = [_Pair(group) for group in groups]
        for group, pair in zip(groups, pairs, strict=True):
            inside = group.paths[0].removeprefix(f"{walk.path}.")
            stack.enter_context(_hook(layer.get_submodule(inside), pair.ships, rounded=True))
            stack.enter_context(_hook(walk.before.get_submodule(inside), pair.was))
        stack.enter_context(_same_routing(layer, walk.before))

        def flush() -> None:
            for pair in pairs:
                pair.flush()

        walk.run(flush)


class _Pair:
    """The inputs of one batch in both layers, until both are there."""

    def __init__(self, group: Group) -> None:
        self._statistics = group.statistics
        self._shipped: torch.Tensor | None = None
        self._before: torch.Tensor | None = None

    def ships(self, x: torch.Tensor) -> None:
        self._shipped = x

    def was(self, x: torch.Tensor) -> None:
        self._before = x

    def flush(self) -> None:
        if self._shipped is not None and self._before is not None:
            self._statistics.add(self._before, self._shipped)
        self._shipped = self._before = None


@contextmanager
def _hook(module: Any, take: Any, *, rounded: bool = False) -> Iterator[None]:
    def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        quantizer = getattr(module, "input_quantizer", None)
        if rounded and quantizer is not None and quantizer.is_enabled:
            take(quantizer(args[0]))
        else:
            take(args[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _same_routing(layer: nn.Module, before: nn.Module) -> Iterator[None]:
    """Experts of ``before`` get the tokens that ``layer``, run just before it, sent to them: rows match one by one."""
    chosen: dict[str, tuple[Any, ...]] = {}
    handles = []

    def record(path: str) -> Any:
        return lambda module, args: chosen.__setitem__(path, args[1:])

    def force(path: str) -> Any:
        return lambda module, args: (args[0], *chosen[path])

    for path, module in layer.named_modules():
        if isinstance(module, UnfusedExperts):
            handles.append(module.register_forward_pre_hook(record(path)))
            handles.append(before.get_submodule(path).register_forward_pre_hook(force(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(order: list[tuple[str, ...]], kind: tuple[str, ...], x: torch.Tensor) -> None:
    order.append(kind)


def stages(model: nn.Module, groups: list[Group], family: Family, walk: LayerWalk) -> list[list[Group]]:
    """Groups by the order in which the layer computes them: q/k/v, o, gate/up of all experts, down of all experts.

    Experts run one after the other, so the order is that of the kinds of projections, from one batch.
    """
    kinds: dict[tuple[str, ...], list[Group]] = {}
    order: list[tuple[str, ...]] = []
    with ExitStack() as stack:
        for group in groups:
            kind = family.fused_siblings(family.to_checkpoint(group.paths[0]).rpartition(".")[2])
            kinds.setdefault(kind, []).append(group)
            stack.enter_context(_hook(model.get_submodule(group.paths[0]), partial(_note, order, kind)))
        walk.run(batches=1)
    first = {kind: index for index, kind in reversed(list(enumerate(order)))}
    return [kinds[kind] for kind in sorted(kinds, key=lambda kind: first.get(kind, len(order)))]
