"""Solve the weights again for the inputs that they will really get.

The shipped layer computes W' x~: x~ is x as the target rounds activations, behind the matmuls of the layer that are
already quantized. The W' that comes closest to W x over the calibration tokens is W C H^-1 with C = sum x x~^T and
H = sum x~ x~^T: a Wiener filter, which trusts directions with little signal less and undoes what earlier rounding did
on average. It is a better target for rounding than W itself. Related: GPTAQ's asymmetric calibration, arXiv 2504.02692.
"""

from __future__ import annotations

import torch

from toolchain.quantize.accuracy.statistics import InputStatistics

SHARE = 1.0
"""Of the way from W to the solution."""
DAMPING = 0.01
"""Share of the mean diagonal with which the solution is held to W."""


def compensated(weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    """[N, K] float32 -> [N, K] float32 target of rounding."""
    assert statistics.gram is not None and statistics.cross is not None, "no token was collected"
    gram, cross = statistics.gram, statistics.cross
    hold = torch.eye(len(gram), device=gram.device) * (DAMPING * gram.diagonal().mean())
    wanted = weight @ (cross + hold)
    solved, failed = torch.linalg.solve_ex(gram + hold, wanted.T)
    if failed or not solved.isfinite().all():
        return weight
    return weight + SHARE * (solved.T - weight)
