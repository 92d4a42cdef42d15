"""Solve the weights again for the inputs that they will really get.

The shipped layer computes W' x~: x~ is x as the target rounds activations, behind the matmuls of the layer that are
already quantized. The W' that comes closest to W x over the calibration tokens is W C H^-1 with C = sum x x~^T and
H = sum x~ x~^T: a Wiener filter, which trusts directions with little signal less and undoes what earlier rounding did
on average. It is a better target for rounding than W itself. Related: GPTAQ's asymmetric calibration, arXiv 2504.02692.

A least-squares solution follows its tokens, and a rarely used expert has few: with 256 tokens and K = 128 the full step
made a model worse than no recipe at all. So the step is found on each half of the tokens and its length on the other
half, and nothing is changed where the halves do not agree.
"""

from __future__ import annotations

import torch

from toolchain.quantize.accuracy.statistics import InputStatistics, Products

DAMPING = 0.01
"""Share of the mean diagonal with which the solution is held to W."""


def compensated(weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    """[N, K] float32 -> [N, K] float32 target of rounding: ``weight`` where the tokens do not support another."""
    first, second = statistics.halves
    steps = _step(weight, first), _step(weight, second)
    if steps[0] is None or steps[1] is None:
        return weight
    share = (_length(weight, steps[0], second) + _length(weight, steps[1], first)) / 2
    return weight + share * (steps[0] + steps[1]) / 2


def _step(weight: torch.Tensor, half: Products) -> torch.Tensor | None:
    """[N, K]: from W to the least-squares solution over one half; None when there is none."""
    if half.gram is None or half.cross is None:
        return None
    hold = torch.eye(len(half.gram), device=half.gram.device) * (DAMPING * half.gram.diagonal().mean())
    solved, failed = torch.linalg.solve_ex(half.gram + hold, (weight @ (half.cross + hold)).T)
    step = solved.T - weight
    return None if failed or not step.isfinite().all() else step


def _length(weight: torch.Tensor, step: torch.Tensor, other: Products) -> torch.Tensor:
    """How far to go along ``step`` by the tokens of ``other``: where sum |W x - (W + s * step) x~|^2 is least, 0..1."""
    assert other.gram is not None and other.cross is not None
    gain = (step * (weight @ (other.cross - other.gram))).sum()
    cost = (step @ other.gram * step).sum()
    return (gain / cost.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0.0, 1.0)
