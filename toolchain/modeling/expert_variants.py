"""Experts that are not plain gated MLPs, unfused: gpt-oss and Llama 4. Both store [E, in, out], input first.

Sources: transformers 5.14 ``modeling_gpt_oss.py`` (interleaved columns, biases, clamped SwiGLU) and
``modeling_llama4.py`` (the routing weight scales the *input* of an expert; the block around the experts does it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from toolchain.modeling.experts import ExpertMLP, UnfusedExperts, linear


class ClampedExpertMLP(nn.Module):
    """gpt-oss: down((up + 1) * gate * sigmoid(alpha * gate)), gate clamped from above and up on both sides."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, alpha: float, limit: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.alpha, self.limit = alpha, limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x).clamp(max=self.limit)
        up = self.up_proj(x).clamp(min=-self.limit, max=self.limit)
        return self.down_proj((up + 1) * (gate * torch.sigmoid(gate * self.alpha)))


class ScaledInputExperts(UnfusedExperts):
    """Llama 4: the routing weight multiplies the input of an expert, not its output."""

    def run(self, expert: nn.Module, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return expert(rows * scales)


class Llama4Moe(nn.Module):
    """Drop-in for ``Llama4TextMoe``: hidden [..., H] -> (output [T, H], router logits [T, E]).

    transformers runs every expert on every token and multiplies the inputs of those that were not chosen by zero; their
    outputs are zero, because nothing in an expert has a bias. Here they are not run.
    """

    def __init__(self, moe: Any, experts: ScaledInputExperts) -> None:
        super().__init__()
        self.router, self.shared_expert, self.experts = moe.router, moe.shared_expert, experts
        self.hidden_dim = moe.hidden_dim

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden)
        # The router gives sigmoid scores for its top k and sigmoid(-inf) = 0 for all others.
        weights, indices = scores.topk(self.router.top_k, dim=-1)
        return self.shared_expert(hidden) + self.experts(hidden, indices, weights), logits


def _copies(stored: torch.Tensor, parts: int, interleaved: bool, blank: bool) -> list[torch.Tensor]:
    """[in, parts*out] -> ``parts`` contiguous [out, in] matrices, or uninitialised ones of that shape."""
    width = stored.shape[1] // parts
    if blank:
        return [stored.new_empty(width, stored.shape[0]) for _ in range(parts)]
    pieces = [stored[:, part::parts] for part in range(parts)] if interleaved else stored.split(width, dim=1)
    return [piece.T.contiguous() for piece in pieces]


def _gpt_oss(fused: Any, blank: bool) -> UnfusedExperts:
    experts = []
    for index in range(fused.num_experts):
        gate, up = _copies(fused.gate_up_proj.data[index], 2, True, blank)
        (down,) = _copies(fused.down_proj.data[index], 1, False, blank)
        bias = fused.gate_up_proj_bias.data[index]
        experts.append(
            ClampedExpertMLP(
                linear(gate, bias[0::2].clone()),
                linear(up, bias[1::2].clone()),
                linear(down, fused.down_proj_bias.data[index]),
                fused.alpha,
                fused.limit,
            )
        )
    return UnfusedExperts(experts)


def _llama4(moe: Any, blank: bool) -> Llama4Moe:
    fused, experts = moe.experts, []
    for index in range(fused.num_experts):
        gate, up = _copies(fused.gate_up_proj.data[index], 2, False, blank)
        (down,) = _copies(fused.down_proj.data[index], 1, False, blank)
        experts.append(ExpertMLP(linear(gate), linear(up), linear(down), fused.act_fn))
    return Llama4Moe(moe, ScaledInputExperts(experts))


VARIANTS: dict[str, Callable[[Any, bool], nn.Module]] = {"GptOssExperts": _gpt_oss, "Llama4TextMoe": _llama4}
"""transformers class name -> what replaces a module of it."""
