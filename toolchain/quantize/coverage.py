"""How many calibration tokens and samples each expert saw: counted where the router's choice arrives at the experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from toolchain.modeling.experts import UnfusedExperts


class Coverage:
    """Counts of the last pass. Paths are those of the experts modules."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.experts: dict[str, int] = {
            path: module.num_experts
            for path, module in model.named_modules()
            if isinstance(module, UnfusedExperts)
        }
        self._parts: dict[str, list[torch.Tensor]] = {}
        self.measured = False
        """False until a pass counts: no count is not a count of zero."""

    @contextlib.contextmanager
    def counting(self, length_tokens: int, inside: str = "") -> Iterator[None]:
        """Count from zero: the result is that of one pass over the data, however many passes an algorithm makes.

        ``length_tokens``: tokens of each sample, which follow each other in what arrives at the experts. ``inside``:
        prefix of the experts to count, a layer of a walk; the counts of others stay.
        """
        paths = [path for path in self.experts if path.startswith(inside)]
        self._parts |= {path: [] for path in paths}
        self.measured = True
        hooks = [
            self._model.get_submodule(path).register_forward_pre_hook(self._hook(path, length_tokens))
            for path in paths
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str, length: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            indices = args[1]
            # Index num_experts marks "no expert" in models that mask tokens: counted apart and cut off.
            columns, rows = self.experts[path] + 1, -(-len(indices) // length)
            sample = torch.arange(len(indices), device=indices.device) // length
            places = (sample.unsqueeze(1) * columns + indices).flatten()
            counts = torch.bincount(places, minlength=rows * columns).view(rows, columns)
            self._parts[path].append(counts[:, :-1].to(torch.int32).cpu())

        return count

    def put(self, path: str, counts: torch.Tensor) -> None:
        """Take [samples, num_experts] int32 counts of ``path`` from an earlier run."""
        self._parts[path] = [counts]
        self.measured = True

    @property
    def drawn(self) -> int:
        """Samples counted so far."""
        return next((sum(map(len, parts)) for parts in self._parts.values()), 0)

    def of(self, rows: list[int]) -> Coverage:
        """The coverage that these samples alone would have had."""
        part = Coverage(self._model)
        part._parts = {path: [self.by_sample(path)[rows]] for path in self.experts}
        part.measured = self.measured
        return part

    def by_sample(self, path: str) -> torch.Tensor:
        """[samples, num_experts] int32: routed tokens."""
        parts = self._parts.get(path)
        return torch.cat(parts) if parts else torch.zeros(0, self.experts[path], dtype=torch.int32)

    def matrix(self) -> torch.Tensor:
        """[samples, experts of all layers] int32, layers side by side."""
        return torch.cat([self.by_sample(path) for path in self.experts], dim=1)

    def tokens(self, path: str) -> torch.Tensor:
        """[num_experts] int64: tokens that the router sent to each expert."""
        return self.by_sample(path).sum(0)

    def samples(self, path: str) -> torch.Tensor:
        """[num_experts] int64: samples of which at least one token went to the expert."""
        return (self.by_sample(path) > 0).sum(0)

    def starved(self, minimum: int = 1) -> list[tuple[str, int]]:
        """(experts path, expert) pairs to which the router sent fewer than ``minimum`` tokens; none if unmeasured."""
        if not self.measured:
            return []
        return [
            (path, int(expert))
            for path in self.experts
            for expert in (self.tokens(path) < minimum).nonzero().flatten()
        ]

    def layers_json(self, minimum: int, extra: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Per experts path what ``coverage.json`` says of a layer (README of this room). ``extra``: tokens that an
        expert saw without having been chosen for them."""
        found = {}
        for path in self.experts:
            tokens = self.tokens(path)
            mean = float(tokens.double().mean())
            found[path] = {
                "tokens": tokens.tolist(),
                "samples": self.samples(path).tolist(),
                "seen": (tokens + extra[path] if path in extra else tokens).tolist(),
                "min": int(tokens.min()),
                "max": int(tokens.max()),
                "mean": mean,
                "cv": float(tokens.double().std(unbiased=False)) / mean if mean else 0.0,
                "starved": (tokens < minimum).nonzero().flatten().tolist(),
            }
        return found
