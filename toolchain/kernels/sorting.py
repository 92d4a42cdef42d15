"""Choosing experts and sorting pairs of token and expert, as functions of torch tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from toolchain.kernels import routing
from toolchain.kernels.settings import LONE_PAIRS


@dataclass(frozen=True, kw_only=True)
class Route:
    """Pairs (token, choice) sorted by expert, in blocks of one expert each."""

    ids: torch.Tensor
    """int32 [pairs]: expert of each pair; beyond the experts: of none."""
    top_k: int
    order: torch.Tensor
    block_expert: torch.Tensor
    block_begin: torch.Tensor
    block_rows: torch.Tensor
    block_m: int
    counts: torch.Tensor | None = None
    """int32 [experts]: pairs of each; None where they are not sorted."""

    @property
    def pairs(self) -> int:
        return self.ids.numel()

    @property
    def blocks(self) -> int:
        return self.block_expert.numel()


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a router makes experts and weights of its logits; see ``routing.choose``."""

    scoring: str
    top_k: int
    normalize: bool = False
    epsilon: float = 0.0
    factor: float = 1.0
    groups: int = 1
    top_groups: int = 1
    best_of_group: int = 1


def choose_experts(
    logits: torch.Tensor, scoring: Scoring, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> ids int32 [T, k] and weights float32 [T, k]."""
    tokens, experts = logits.shape
    ids = torch.empty((tokens, scoring.top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((tokens, scoring.top_k), dtype=torch.float32, device=logits.device)
    if tokens:
        routing.choose[(tokens,)](
            logits,
            bias,
            ids,
            weights,
            experts,
            logits.stride(0),
            scoring.factor,
            SCORING=scoring.scoring,
            BIAS=bias is not None,
            TOP_K=scoring.top_k,
            GROUPS=scoring.groups,
            TOP_GROUPS=scoring.top_groups,
            BEST_OF_GROUP=scoring.best_of_group,
            NORMALIZE=scoring.normalize,
            EPSILON=scoring.epsilon,
            BLOCK_E=triton.next_power_of_2(experts),
            num_warps=1 if experts <= 128 else 4,
        )
    return ids, weights


def make_route(ids: torch.Tensor, experts: int, block_m: int) -> Route:
    """ids [T, k] -> Route with blocks of at most ``block_m`` pairs. Nothing is read back from the GPU."""
    top_k = ids.shape[-1]
    flat = ids.reshape(-1).to(torch.int32)
    if flat.numel() <= LONE_PAIRS:
        return _lone_route(flat, experts, top_k, block_m)
    pairs, device = flat.numel(), flat.device
    most = min(pairs, pairs // block_m + min(experts, pairs))

    def empty(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    cursors, order = empty(experts), torch.zeros_like(flat)
    route = Route(
        ids=flat,
        top_k=top_k,
        order=order,
        block_expert=empty(most),
        block_begin=empty(most),
        block_rows=empty(most),
        block_m=block_m,
        counts=counts,
    )
    size = 256
    grid = (triton.cdiv(pairs, size),)
    routing.count[grid](flat, counts, pairs, experts, BLOCK=size)
    routing.divide[(most,)](
        counts,
        cursors,
        route.block_expert,
        route.block_begin,
        route.block_rows,
        experts,
        BLOCK_M=block_m,
        BLOCK_E=triton.next_power_of_2(experts),
    )
    routing.place[grid](flat, cursors, order, pairs, experts, BLOCK=size)
    return route


def _lone_route(flat: torch.Tensor, experts: int, top_k: int, block_m: int) -> Route:
    """Every pair is a block of its own."""
    order = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    return Route(
        ids=flat,
        top_k=top_k,
        order=order,
        block_expert=torch.where((flat >= 0) & (flat < experts), flat, -1),
        block_begin=order,
        block_rows=torch.ones_like(order),
        block_m=block_m,
    )


def combine(outputs: torch.Tensor, ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Weighted outputs of pairs [T * k, H] with ids [T, k] -> their sums [T, H]."""
    tokens, top_k = ids.shape
    width = outputs.shape[1]
    result = torch.empty((tokens, width), dtype=outputs.dtype, device=outputs.device)
    if tokens:
        block = min(triton.next_power_of_2(width), 1024)
        routing.combine[(tokens, triton.cdiv(width, block))](
            outputs, ids.to(torch.int32), result, experts, width, TOP_K=top_k, BLOCK=block
        )
    return result
