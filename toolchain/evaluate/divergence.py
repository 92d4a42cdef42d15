"""Next-token distributions of several models, token by token: one number per token is all that is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROWS = 64
"""Positions whose distributions are held in float64 at a time: half a dozen of [64, V] are 460 MB at V = 150,000."""
TOP = 5
"""Tokens whose set is compared beside the first choice."""


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood [N] float64 in nats of ``targets`` [N] under ``logits`` [N, V]."""
    return _nll(_log_softmax(logits), targets)


def token_kl(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(reference || logits) [N] float64 in nats, of two [N, V]."""
    return _kl(_log_softmax(reference), _log_softmax(logits))


def score_tokens(
    reference: torch.Tensor | None, others: Mapping[str, torch.Tensor], targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Logits [N, V] of the baseline and of others at the same N positions -> ``name/figure`` -> [N] on the CPU.

    Figures: ``nll``, and against ``reference`` ``kl`` (reference || other) and ``reverse_kl``, float64 nats; ``top1``
    (the same first choice) and ``top5`` (tokens that both sets of five have in common), uint8.
    """
    import torch

    parts: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, values: torch.Tensor) -> None:
        parts.setdefault(name, []).append(values)

    for at in range(0, len(targets), ROWS):
        rows = slice(at, at + ROWS)
        p = None
        if reference is not None:
            theirs = reference[rows]
            p = _log_softmax(theirs)
            keep("baseline/nll", _nll(p, targets[rows]))
        for name, logits in others.items():
            mine = logits[rows]
            q = _log_softmax(mine)
            keep(f"{name}/nll", _nll(q, targets[rows]))
            if p is not None:
                keep(f"{name}/kl", _kl(p, q))
                keep(f"{name}/reverse_kl", _kl(q, p))
                keep(f"{name}/top1", (mine.argmax(-1) == theirs.argmax(-1)).byte())
                keep(f"{name}/top5", _common(_top(mine), _top(theirs)))
    return {name: torch.cat(values).cpu() for name, values in parts.items()}


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.log_softmax(logits, dim=-1, dtype=torch.float64)


def _nll(log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -log_p.gather(-1, targets[:, None])[:, 0]


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    import torch

    # A token that p excludes (-inf) contributes nothing; exp(-inf) * -inf would be NaN.
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _top(logits: torch.Tensor) -> torch.Tensor:
    return logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices


def _common(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """How many of the token ids [N, k] of both sets are the same: [N] uint8."""
    return (mine[:, :, None] == theirs[:, None, :]).any(dim=-1).sum(dim=-1).byte()
