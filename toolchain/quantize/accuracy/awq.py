"""AWQ's search for channel scales, exact over all calibration tokens, from one Gram matrix per input.

AWQ picks per Linear the alpha in {0, 0.1, .. 1} whose scales s = act**alpha / weight**(1 - alpha) minimise
sum over tokens |x W^T - (x / s) Q(W s)^T|^2 (ModelOpt ``awq_lite``). With D = W - Q(W s) / s that sum equals
trace(D H D^T), H = X^T X: tokens enter once, through H, instead of once per alpha. Projections that share their input
(q/k/v, gate/up of one expert) share one scale, as runtimes demand; ModelOpt searches them apart and averages.
"""

from __future__ import annotations

import torch

from toolchain.codecs import int4_awq
from toolchain.quantize.accuracy.statistics import InputStatistics

ALPHAS = tuple(step / 10 for step in range(11))


def search(weights: list[torch.Tensor], statistics: InputStatistics) -> tuple[torch.Tensor, float]:
    """Best channel scale [K] (float32, geometric middle 1) for [N_i, K] weights with one input, and its alpha."""
    weight = torch.cat([item.float() for item in weights])
    assert statistics.absolute is not None and statistics.gram is not None, "no token was collected"
    act = statistics.absolute / statistics.tokens
    per_weight = _relative_magnitude(weight)
    best_loss, best_scale, best_alpha = float("inf"), torch.ones_like(act), 0.0
    for alpha in ALPHAS:
        scale = _scale(act, per_weight, alpha)
        error = weight - int4_awq.fake_quantize(weight * scale) / scale
        loss = float((error @ statistics.gram * error).sum())
        if loss < best_loss:
            best_loss, best_scale, best_alpha = loss, scale, alpha
    return best_scale, best_alpha


def _relative_magnitude(weight: torch.Tensor) -> torch.Tensor:
    """[K] mean over rows of |w| relative to the largest of its group of 128."""
    grouped = weight.unflatten(-1, (-1, int4_awq.GROUP)).abs()
    tiny = torch.finfo(torch.float32).tiny
    return (grouped / (grouped.amax(-1, keepdim=True) + tiny)).flatten(-2).mean(0)


def _scale(act: torch.Tensor, per_weight: torch.Tensor, alpha: float) -> torch.Tensor:
    tiny = torch.finfo(torch.float32).tiny
    scale = (act.pow(alpha) / (per_weight.pow(1 - alpha) + tiny)).clamp(1e-4, 1e4)
    return scale / (scale.max() * scale.min()).sqrt()
