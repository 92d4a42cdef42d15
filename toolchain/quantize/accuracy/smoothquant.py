"""SmoothQuant with a searched alpha: move range from activations to weights where that lowers the output error.

s = largest|x|**alpha / largest|w|**(1 - alpha) per channel (arXiv 2211.10438; the usual alpha is 0.5). Both errors
follow from sums over the tokens: rounding x / s to steps of d = max|x / s| / 127 adds d**2 / 12 per channel, weighted
by the columns of W s, and rounding W s per output channel adds trace(D H D^T). A large alpha makes all channels reach
the end of the range, so that any new token may exceed it in many: what one half of the tokens would clip under the
ranges of the other half is added.
"""

from __future__ import annotations

import torch

from toolchain.codecs import Calibrated, get_codec
from toolchain.codecs.int8 import INT8_MAX
from toolchain.quantize.accuracy.statistics import InputStatistics

ALPHAS = tuple(step / 10 for step in range(11))


def search(weights: list[torch.Tensor], statistics: InputStatistics) -> tuple[torch.Tensor, float]:
    """Best channel scale [K] (float32) for [N_i, K] weights with one input, and its alpha."""
    weight = torch.cat([item.float() for item in weights])
    assert statistics.largest is not None and statistics.gram is not None, "no token was collected"
    act, columns = statistics.largest, weight.abs().amax(0)
    best_loss, best_scale, best_alpha = float("inf"), torch.ones_like(act), 0.0
    for alpha in ALPHAS:
        scale = _scale(act, columns, alpha)
        scaled = weight * scale
        step = (act / scale).max() / INT8_MAX
        error = weight - _rounded(scaled) / scale
        rounding = statistics.tokens * step**2 / 12 * scaled.square().sum()
        clipping = _clipped(weight, statistics.peaks, columns, alpha)
        loss = float((error @ statistics.gram * error).sum() + rounding + clipping)
        if loss < best_loss:
            best_loss, best_scale, best_alpha = loss, scale, alpha
    return best_scale, best_alpha


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    codec = get_codec("int8_wo")
    return codec.unpack(codec.pack(weight, Calibrated()), torch.float32)


def _clipped(
    weight: torch.Tensor, peaks: list[torch.Tensor | None], columns: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Squared output error if one token per channel reached the peak of the other half; 0 when there is one token."""
    total = weight.new_zeros(())
    for mine, other in zip(peaks, reversed(peaks), strict=True):
        if mine is None or other is None:
            return total
        scale = _scale(mine, columns, alpha)
        beyond = (other / scale - (mine / scale).max()).clamp(min=0)
        total += (beyond.square() * (weight * scale).square().sum(0)).sum()
    return total


def _scale(act: torch.Tensor, columns: torch.Tensor, alpha: float) -> torch.Tensor:
    """1 for channels that no token or no weight uses: there is nothing to move."""
    scale = act.pow(alpha) / columns.pow(1 - alpha).clamp(min=1e-8)
    usable = (act > 0) & (columns > 0)
    scale = torch.where(usable, scale.clamp(1e-4, 1e4), torch.ones_like(scale))
    return scale / scale.median()
