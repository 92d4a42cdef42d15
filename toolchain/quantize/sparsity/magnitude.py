"""Magnitude: of four neighbours along the input the two largest stay."""

from __future__ import annotations

import torch

MODELOPT_PATTERN = "2:4 sparsity"


@torch.no_grad()
def pruned(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [N, K] with the zeros that ModelOpt's ``sparse_magnitude`` chooses, in the weight's dtype.

    Rows do not know of each other, so any rows of a matrix may come alone.
    """
    from modelopt.torch.sparsity.weight_sparsity.magnitude import create_asp_mask

    return without_negative_zeros(weight * create_asp_mask(weight, MODELOPT_PATTERN))


def without_negative_zeros(weight: torch.Tensor) -> torch.Tensor:
    """A mask turns what was below zero into -0, which several formats would store."""
    return weight + 0.0
