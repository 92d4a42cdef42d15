"""Unfusing: 3-D expert parameters of transformers 5 become one Linear per expert and projection.

Why: ModelOpt gives a fused module one input quantizer for all experts, ignores its MoE calibration options, falls back
to plain rounding under AWQ and fails to export INT4. Per-expert Linears have none of these limits, and carry the names
of the checkpoint. The forward pass is the same mathematics (tests compare with transformers' own). Layouts that differ
from the usual one are in ``expert_variants.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from toolchain.core.errors import ToolchainError


class ExpertMLP(nn.Module):
    """One routed expert: down(act(gate(x)) * up(x))."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, act_fn: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A Linear around ``weight`` [out, in], shared and not copied."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


class UnfusedExperts(nn.ModuleList):
    """Drop-in for transformers' ``*Experts`` modules: (hidden [T, H], indices [T, k], weights [T, k]) -> [T, H].

    The common base of all variants: coverage, routing agreement and calibration listen at its three arguments.
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        self.num_experts = len(self)

    def run(self, expert: nn.Module, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """One expert on its tokens ``rows`` [t, H] with their routing weights ``scales`` [t, 1]."""
        return expert(rows) * scales

    def forward(self, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Tokens are sorted by expert once, so each expert runs one matmul over its contiguous rows."""
        top_k = indices.shape[-1]
        order = indices.flatten().argsort(stable=True)
        tokens = order // top_k
        scales = weights.flatten()[order].unsqueeze(-1)
        # Index num_experts marks "no expert" in models that mask tokens: those rows come last and are not run.
        counts = torch.bincount(indices.flatten(), minlength=self.num_experts)[: self.num_experts].tolist()
        output = torch.zeros_like(hidden)
        start = 0
        for expert, count in zip(self, counts, strict=True):
            if count:
                rows = tokens[start : start + count]
                result = self.run(expert, hidden[rows], scales[start : start + count])
                output.index_add_(0, rows, result.to(output.dtype))
            start += count
        return output


def unfuse_experts(model: nn.Module, *, blank: bool = False) -> int:
    """Replace every fused experts module of ``model`` in place; returns how many.

    Weights that are stored output-first are shared, not copied; input-first ones are copied layer by layer, or only
    allocated when ``blank`` says that they hold nothing yet. Raises ToolchainError TC-203 for a layout whose
    mathematics is not known here.
    """
    from toolchain.modeling.expert_variants import VARIANTS

    replaced: list[str] = []
    for path, module in list(model.named_modules()):
        variant = VARIANTS.get(type(module).__name__)
        if any(path.startswith(f"{done}.") for done in replaced[-1:]):
            continue  # a variant may replace the block around the experts
        if variant is not None:
            new: nn.Module = variant(module, blank)
        elif _is_fused(module):
            _refuse_other_layouts(path, module)
            new = _plain(module)
        else:
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
        replaced.append(path)
    return len(replaced)


def _is_fused(module: nn.Module) -> bool:
    gate_up = getattr(module, "gate_up_proj", None)
    return isinstance(gate_up, nn.Parameter) and gate_up.dim() == 3


def _plain(fused: Any) -> UnfusedExperts:
    """``gate_up_proj`` [E, 2*I, H] and ``down_proj`` [E, H, I]: the experts are views of them."""
    gate_up, down = fused.gate_up_proj.data, fused.down_proj.data
    experts = []
    for index in range(len(down)):
        gate, up = gate_up[index].chunk(2, dim=0)
        experts.append(ExpertMLP(linear(gate), linear(up), linear(down[index]), fused.act_fn))
    return UnfusedExperts(experts)


def _refuse_other_layouts(path: str, module: nn.Module) -> None:
    from transformers.integrations.moe import _default_apply_gate

    plain_gate = getattr(type(module), "_apply_gate", None) in (None, _default_apply_gate)
    flags = {name: getattr(module, name, None) for name in ("is_transposed", "has_bias")}
    interleaved = not getattr(module, "is_concatenated", True)
    hidden = getattr(module, "hidden_dim", getattr(module, "hidden_size", None))
    in_last = hidden is None or module.gate_up_proj.shape[-1] == hidden
    has_act = callable(getattr(module, "act_fn", None))
    if any(flags.values()) or interleaved or not plain_gate or not in_last or not has_act:
        raise ToolchainError(
            f"{path} ({type(module).__name__}) stores its experts in a layout that cannot be split into plain gated "
            f"MLPs: {flags}, interleaved={interleaved}, own gate={not plain_gate}",
            hint="this family can be planned, not quantized yet; add it to toolchain/modeling/expert_variants.py",
            code="TC-203",
        )
