"""What the numbers of a model look like: tails of weights and outlier channels of activations decide what a block
format loses, and a small model need not have those of a large one. Reported, so that the reader knows."""

from __future__ import annotations

import statistics
from typing import Any

import torch


class _Moments:
    """Of one Linear's input: sums over elements, and the largest magnitude of each channel."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.amax = torch.zeros(())

    def add(self, x: torch.Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).double()
        if not len(flat):
            return
        self.count += flat.numel()
        self.sums += torch.stack([flat.pow(power).sum() for power in (1, 2, 3, 4)])
        self.amax = torch.maximum(self.amax, flat.abs().amax(dim=0))

    def kurtosis(self) -> float:
        m1, m2, m3, m4 = (self.sums / self.count).tolist()
        variance = m2 - m1**2
        return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2

    def channel_ratio(self) -> float:
        """Largest channel's amax over the median channel's: 1 is flat, tens are outlier channels."""
        return float(self.amax.max() / self.amax.median())


@torch.no_grad()
def describe_tensors(model: Any, windows: torch.Tensor) -> dict[str, float]:
    """Kurtosis (3 for a Gaussian) of Linear inputs and of matrices, median and maximum over modules.

    ``windows`` [n, length] are run through ``model``; experts are seen through the inputs of their module.
    """
    moments: dict[str, _Moments] = {}
    hooks = []
    for name, module in model.named_modules():
        if (isinstance(module, torch.nn.Linear) or name.endswith(".experts")) and name != "lm_head":
            moments[name] = _Moments()
            hooks.append(module.register_forward_pre_hook(_observe(moments[name])))
    model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    activations = [item.kurtosis() for item in moments.values() if item.count]
    ratios = [item.channel_ratio() for item in moments.values() if item.count]
    weights = [
        _kurtosis(p.double())
        for name, p in model.named_parameters()
        if p.dim() >= 2 and "embed" not in name and "lm_head" not in name
    ]
    return {
        "activation_kurtosis_median": statistics.median(activations),
        "activation_kurtosis_max": max(activations),
        "activation_channel_ratio_median": statistics.median(ratios),
        "activation_channel_ratio_max": max(ratios),
        "weight_kurtosis_median": statistics.median(weights),
        "weight_kurtosis_max": max(weights),
    }


def _observe(moments: _Moments) -> Any:
    def observe(module: Any, arguments: tuple[Any, ...]) -> None:
        moments.add(arguments[0])

    return observe


def _kurtosis(x: torch.Tensor) -> float:
    centred = x - x.mean()
    return float(centred.pow(4).mean() / centred.pow(2).mean() ** 2)
