"""Which experts see a token during calibration: the routed ones, or more of them.

The others run beside the layer, for their statistics alone: what they compute is thrown away, so the layer's output,
and with it the input of every later layer, is that of the model's own routing, bit for bit. ModelOpt
(``moe_calib_experts_ratio``) reaches the same by running the whole block twice, once with a larger ``top_k``; here the
routed experts run once. What remains true of both: an expert that sees tokens that are never sent to it gets ranges
that are wider than it needs, which is why the router's own choice is the default.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from toolchain.core.errors import ToolchainError
from toolchain.modeling.experts import UnfusedExperts
from toolchain.plan.types import Calibration


class Widening:
    """Runs experts that the router did not choose, while ``active``. Does nothing in mode ``routed``."""

    def __init__(self, model: nn.Module, settings: Calibration) -> None:
        """ToolchainError TC-223 when the router of an experts module cannot be found in a mode that needs it."""
        self._model, self._mode, self._ratio = model, settings.mode, settings.topk_ratio
        self._experts = {
            path: module.num_experts
            for path, module in model.named_modules()
            if isinstance(module, UnfusedExperts)
        }
        if self._mode != "routed":
            for path in self._experts:
                find_router(model, path)
        self.extra: dict[str, torch.Tensor] = {}
        """Experts module path -> int64 [num_experts]: tokens beyond the routed ones in the last pass."""

    @contextlib.contextmanager
    def active(self, inside: str = "") -> Iterator[None]:
        """``inside``: prefix of the experts to run; the counts of others stay."""
        paths = [path for path in self._experts if path.startswith(inside)]
        self.extra |= {path: torch.zeros(self._experts[path], dtype=torch.int64) for path in paths}
        paths = [] if self._mode == "routed" else paths
        hooks = [
            self._model.get_submodule(path).register_forward_pre_hook(self._hook(path)) for path in paths
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str) -> Any:
        def run(module: Any, args: tuple[Any, ...]) -> None:
            hidden, indices = args[0], args[1]
            scores = router_scores(find_router(self._model, path), hidden)
            others = self._others(scores, indices)
            self.extra[path] += others.sum(0).cpu()
            # Where the routing weight scales an expert's input (Llama 4), it is the sigmoid of the router's score.
            weights = scores.sigmoid().to(hidden.dtype)
            for index, expert in enumerate(module):
                rows = others[:, index].nonzero().flatten()
                if len(rows):
                    module.run(expert, hidden[rows], weights[rows, index : index + 1])

        return run

    def _others(self, scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """[T, E] bool: who sees a token without having been chosen for it."""
        count = scores.shape[1]
        # Index ``count`` marks "no expert" in models that mask tokens: those tokens go nowhere.
        chosen = torch.zeros(len(indices), count + 1, dtype=torch.bool, device=indices.device)
        chosen = chosen.scatter_(1, indices, True)[:, :count]
        wanted = torch.ones_like(chosen)
        if self._mode == "topk":
            width = max(indices.shape[1], math.ceil(self._ratio * count))
            ranks = scores.masked_fill(chosen, math.inf)
            wanted = torch.zeros_like(chosen).scatter_(1, ranks.topk(width, dim=-1).indices, True)
        return wanted & ~chosen & chosen.any(1, keepdim=True)


def find_router(model: nn.Module, path: str) -> nn.Module:
    """The router of the experts at ``path``: the sibling whose weight has one row per expert."""
    parent, _, own = path.rpartition(".")
    experts: Any = model.get_submodule(path)
    found = []
    for name, module in model.get_submodule(parent).named_children():
        weight = getattr(module, "weight", None)
        if (
            name != own
            and isinstance(weight, torch.Tensor)
            and weight.dim() == 2
            and len(weight) == experts.num_experts
        ):
            found.append(module)
    if len(found) != 1:
        raise ToolchainError(
            f"{path}: {len(found)} modules beside the experts look like their router, expected one with a row for each "
            f"of {experts.num_experts} experts",
            hint="use --calibrate-experts routed for this model",
            code="TC-223",
        )
    return found[0]


def router_scores(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    """[T, E] float32, in the order in which the router prefers experts (without limits on groups of experts).

    Computed from its weight, because routers of different families return different things. Where a correction bias
    balances the load (DeepSeek-V3 and GLM-4 MoE), the choice is by sigmoid + bias, as in those models.
    """
    bias = getattr(router, "bias", None)
    scores = torch.nn.functional.linear(
        hidden.float(), router.weight.float(), None if bias is None else bias.float()
    )
    correction = getattr(router, "e_score_correction_bias", None)
    return scores if correction is None else scores.sigmoid() + correction.float()
