"""Unfusing: 3-D expert parameters of transformers 5 become one Linear per expert and projection.

Why: ModelOpt gives a fused module one input quantizer for all experts, ignores its MoE calibration options, falls back
to plain rounding under AWQ and fails to export INT4. Per-expert Linears have none of these limits, and carry the names
of the checkpoint. The forward pass is the same mathematics (tests compare with transformers' own).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolchain.core.errors import ToolchainError


class ExpertMLP(nn.Module):
    """One routed expert: down(act(gate(x)) * up(x))."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act_fn: Any) -> None:
        """``gate_up`` [2*I, H] and ``down`` [H, I] are shared, not copied: views of the fused parameters."""
        super().__init__()
        gate, up = gate_up.chunk(2, dim=0)
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class UnfusedExperts(nn.ModuleList):
    """Drop-in for transformers' ``*Experts`` modules: (hidden [T, H], indices [T, k], weights [T, k]) -> [T, H]."""

    def __init__(self, fused: nn.Module) -> None:
        gate_up, down, act_fn = fused.gate_up_proj.data, fused.down_proj.data, fused.act_fn
        super().__init__(ExpertMLP(gate_up[index], down[index], act_fn) for index in range(len(down)))
        self.num_experts = len(down)

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
                result = expert(hidden[rows]) * scales[start : start + count]
                output.index_add_(0, rows, result.to(output.dtype))
            start += count
        return output


def unfuse_experts(model: nn.Module) -> int:
    """Replace every fused experts module of ``model`` in place; returns how many. The weights are shared, not copied.

    Raises ToolchainError for a fused layout whose mathematics is not the plain gated MLP (gpt-oss, Llama 4).
    """
    replaced = 0
    for path, module in list(model.named_modules()):
        gate_up = getattr(module, "gate_up_proj", None)
        if not isinstance(gate_up, nn.Parameter) or gate_up.dim() != 3:
            continue
        _refuse_other_layouts(path, module)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, UnfusedExperts(module))
        replaced += 1
    return replaced


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
            hint="this family can be planned, not quantized yet",
            code="TC-203",
        )
