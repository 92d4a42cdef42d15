"""Distilling the routers, too: a token's experts are chosen anew in every layer, on inputs that rounding moved.

Frozen routers see other hidden states in the student than in the teacher; where two experts are close, the choice
flips, and the loss of the next token, one number for all layers, says little about where. So the KL divergence of each
router's distribution is a loss of its own. What it gives on the demo: README.md of this room.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from toolchain.core.errors import ToolchainError
from toolchain.core.roles import Role
from toolchain.families import Family
from toolchain.modeling.experts import UnfusedExperts


class RouterLogits:
    """Listens to the routers of a model: ``last`` has the logits of its last forward pass, float32 [tokens, experts] by
    module path, before any softmax, sigmoid, bias of balancing or choice of groups."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.last: dict[str, torch.Tensor] = {}
        self.paths = tuple(find_routers(model, family))
        for path in self.paths:
            model.get_submodule(path).register_forward_hook(self._hook(path))

    def _hook(self, path: str) -> Any:
        def listen(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            hidden = arguments[0]
            # In float32, whatever the module computes in: in bf16 close experts would tie.
            with torch.autocast(hidden.device.type, enabled=False):
                bias = getattr(module, "bias", None)
                bias = bias.float() if isinstance(bias, torch.Tensor) else None
                rows = hidden.reshape(-1, hidden.shape[-1]).float()
                self.last[path] = functional.linear(rows, module.weight.float(), bias)

        return listen

    def take(self) -> dict[str, torch.Tensor]:
        """``last``, which begins anew: recomputed layers call the hooks once more."""
        taken, self.last = self.last, {}
        return taken


def find_routers(model: nn.Module, family: Family) -> list[str]:
    """Module paths, in order: matrices [experts, hidden] with the role of a router beside the experts they choose."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, UnfusedExperts):
            continue
        around = path.rpartition(".")[0]
        for name, item in model.get_submodule(around).named_modules():
            weight = getattr(item, "weight", None)
            where = f"{around}.{name}"
            if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or len(weight) != module.num_experts:
                continue
            if family.classify(family.to_checkpoint(where)).role is Role.ROUTER:
                found.append(where)
    return found


def router_divergence(student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor]) -> torch.Tensor:
    """KL(teacher || student) of the softmax over experts: mean over tokens and layers, a float32 scalar.

    ToolchainError TC-266 when the two have other routers, which only a teacher of another make has.
    """
    shapes = [{path: tuple(item.shape) for path, item in one.items()} for one in (student, teacher)]
    if shapes[0] != shapes[1] or not student:
        raise ToolchainError(
            f"the routers of student and teacher are not the same: {_first(shapes[0])}, in the teacher "
            f"{_first(shapes[1])}",
            hint="leave --router-weight out, or distil from the unquantized model itself",
            code="TC-266",
        )
    parts = []
    for path, mine in student.items():
        log_p, log_q = teacher[path].log_softmax(-1), mine.log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return torch.stack(parts).mean()


def _first(shapes: dict[str, tuple[int, ...]]) -> str:
    if not shapes:
        return "none"
    path, shape = next(iter(shapes.items()))
    return f"{len(shapes)}, the first {path} {list(shape)}"
