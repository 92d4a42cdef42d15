"""Two models inside, layer by layer: how far hidden states went apart, and which experts they chose.

Everything is summed per window, so that windows can be resampled later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.evaluate.observing import Observed

if TYPE_CHECKING:
    import torch


def squared_error(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """[B, T] float64: ||mine - theirs||^2 / ||theirs||^2 of hidden states [B, T, H], per position.

    Per position, not over all: the first token of a window has a norm of a hundred others in many models and would be
    the only one that counts. A position of zeros counts as 0.
    """
    import torch

    wide = torch.promote_types(theirs.dtype, torch.float32)
    norm = torch.linalg.vector_norm
    error = norm(mine.to(wide) - theirs.to(wide), dim=-1, dtype=torch.float64)
    size = norm(theirs.to(wide), dim=-1, dtype=torch.float64)
    return torch.where(size > 0, error / size, 0.0).square()


def hidden_sums(observed: Observed, fresh: int) -> torch.Tensor:
    """[B, layers] float64: sums of ``squared_error`` (kept in ``observed.hidden``) over positions from ``fresh`` on."""
    import torch

    sums = [observed.hidden[layer][:, fresh:].sum(dim=1) for layer in sorted(observed.hidden)]
    return torch.stack(sums, dim=1).cpu()


def routing_sums(mine: Observed, theirs: Observed, shape: torch.Size, fresh: int) -> torch.Tensor | None:
    """[B, MoE layers, 3] float64, sums over positions: share of choices in common, whole sets that are the same, and
    the share in common weighted by the routing weights of ``theirs``.

    ``shape``: (B, T). None when the experts of both were not recorded alike, as when one of them keeps fused experts.
    """
    import torch

    layers = sorted(theirs.routing)
    if not layers or sorted(mine.routing) != layers or not _whole(theirs, shape):
        return None
    sums = []
    for layer in layers:
        (chosen, _), (reference, weights) = mine.routing[layer], theirs.routing[layer]
        same = (reference[:, :, None] == chosen.to(reference.device)[:, None, :]).any(dim=-1).double()
        # Weights of zero only: an expert layer that adds nothing, every choice counts the same.
        mass = weights.double()
        mass = torch.where(mass.sum(-1, keepdim=True) > 0, mass, torch.ones_like(mass))
        weighted = (same * mass).sum(-1) / mass.sum(-1)
        values = torch.stack([same.mean(-1), same.all(dim=-1).double(), weighted], dim=-1)
        sums.append(values.unflatten(0, tuple(shape))[:, fresh:].sum(dim=1))
    return torch.stack(sums, dim=1).cpu()


def loads(observed: Observed, shape: torch.Size, fresh: int) -> torch.Tensor | None:
    """[1, MoE layers, experts] int64: choices of each expert at positions from ``fresh`` on; None for dense models."""
    import torch

    layers = sorted(observed.routing)
    if not layers or not _whole(observed, shape):
        return None
    most = max(observed.experts[layer] for layer in layers)
    counts = []
    for layer in layers:
        chosen = observed.routing[layer][0].unflatten(0, tuple(shape))[:, fresh:].flatten()
        # Index num_experts marks "no expert" in models that mask tokens.
        counts.append(torch.bincount(chosen, minlength=most)[:most])
    return torch.stack(counts)[None].cpu()


def _whole(observed: Observed, shape: torch.Size) -> bool:
    """Whether every MoE layer saw every position."""
    return all(len(indices) == shape.numel() for indices, _ in observed.routing.values())
