"""GPTQ: round one input channel after the other, and let the channels that follow make up for the error.

Source: arXiv 2210.17323. Scales are fixed before (they may be chosen by any search), so channels are taken in the order
of their weight in the Hessian, largest first, without regrouping (static groups).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

DAMPING = 0.01
"""Share of the mean diagonal that is added to the Hessian (GPTQ's own default)."""
BLOCK = 128
"""Channels that are corrected one by one before the rest is corrected in one matmul."""


def solve(
    weight: torch.Tensor,
    factors: torch.Tensor,
    gram: torch.Tensor,
    round_values: Callable[[torch.Tensor], torch.Tensor],
    *,
    damping: float = DAMPING,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """[N, K] float32 weight -> values on the grid (``factors`` [N, K] times what ``round_values`` gives), float32.

    Minimises trace(D H D^T), H = ``gram`` [K, K] / tokens, D the difference to ``weight``. Channels that no token
    excites are rounded to nearest. ``kept`` [N, K] bool: all others become zero, whatever was corrected into them.
    """
    hessian = damped(gram, damping)
    order = hessian.diagonal().argsort(descending=True)
    weight, factors = weight[:, order].clone(), factors[:, order]
    kept = None if kept is None else kept[:, order]
    upper = _inverse_factor(hessian[order][:, order])
    rounded = torch.empty_like(weight)
    width = weight.shape[1]
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors = torch.empty_like(weight[:, start:end])
        for column in range(start, end):
            value = round_values(weight[:, column] / factors[:, column]) * factors[:, column]
            if kept is not None:
                value = torch.where(kept[:, column], value, 0.0)
            rounded[:, column] = value
            error = (weight[:, column] - value) / upper[column, column]
            errors[:, column - start] = error
            weight[:, column + 1 : end] -= error.unsqueeze(1) * upper[column, column + 1 : end]
        weight[:, end:] -= errors @ upper[start:end, end:]
    return rounded[:, order.argsort()]


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """The Gram matrix with ``damping`` times its mean diagonal added, and 1 where a channel is never excited."""
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    diagonal += damping * mean
    return hessian


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse; damping grows until the matrix is numerically positive."""
    extra = hessian.diagonal().mean()
    for attempt in range(8):
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        hessian = hessian + torch.eye(len(hessian), device=hessian.device) * extra * 0.01 * 4**attempt
    raise ArithmeticError("the Hessian of GPTQ is not finite")
