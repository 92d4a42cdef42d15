"""How many calibration tokens each expert saw: counted where the router's choice arrives at the experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from toolchain.modeling.experts import UnfusedExperts


class Coverage:
    """``counts``: experts module path -> int64 tensor [num_experts] of routed tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, torch.Tensor] = {
            path: torch.zeros(module.num_experts, dtype=torch.int64)
            for path, module in model.named_modules()
            if isinstance(module, UnfusedExperts)
        }
        self._model = model

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count from zero: the result is that of one pass over the data, however many passes an algorithm makes."""
        for counts in self.counts.values():
            counts.zero_()
        hooks = [
            self._model.get_submodule(path).register_forward_pre_hook(self._hook(path))
            for path in self.counts
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            experts = self.counts[path]
            chosen = args[1].flatten()
            experts += torch.bincount(chosen, minlength=len(experts))[: len(experts)].cpu()

        return count

    def starved(self) -> list[tuple[str, int]]:
        """(experts path, expert) pairs that saw no token at all."""
        return [
            (path, int(expert))
            for path, counts in self.counts.items()
            for expert in (counts == 0).nonzero().flatten()
        ]

    def to_json(self) -> dict[str, Any]:
        return {path: counts.tolist() for path, counts in self.counts.items()}
