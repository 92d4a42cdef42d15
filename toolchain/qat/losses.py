"""The distillation loss in slices, so that a large vocabulary does not fill the memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

ROWS = 1024
"""Positions whose float32 distributions are held at once: five of [1024, V] are 3 GB at V = 150,000, against 12 GB for
a batch of 8 x 512."""

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(student's logits [N, V], teacher's logits [N, V]) float32 -> loss per position [N], as ModelOpt's
``LogitsDistillationLoss(reduction="none")``."""


def distillation_loss(
    criterion: Criterion, student: torch.Tensor, teacher: torch.Tensor, rows: int = ROWS
) -> torch.Tensor:
    """Mean of ``criterion`` over all positions that predict a next token; logits [B, T, V], a float32 scalar.

    Of vocabularies that are padded differently, the entries that both have count: those of the shared tokenizer.
    """
    student, teacher = same_vocabulary(student, teacher)
    mine, theirs = student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1)

    def part(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return criterion(logits.float(), reference.float()).sum()

    total = mine.new_zeros((), dtype=torch.float32)
    for at in range(0, len(mine), rows):
        cut = mine[at : at + rows], theirs[at : at + rows]
        # The distributions of a slice are computed again in the backward pass instead of being kept.
        several = len(mine) > rows and torch.is_grad_enabled()
        total = total + (checkpoint(part, *cut, use_reentrant=False) if several else part(*cut))
    return total / len(mine)


def same_vocabulary(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both [..., V], cut to the smaller V: embeddings of one tokenizer are padded to different sizes."""
    count = min(mine.shape[-1], theirs.shape[-1])
    return mine[..., :count], theirs[..., :count]
