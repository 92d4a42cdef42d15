"""AWQ's search for channel scales, exact over all calibration tokens, from one Gram matrix per input.

AWQ picks per Linear the alpha in {0, 0.1, .. 1} whose scales s = act**alpha / weight**(1 - alpha) minimise
sum over tokens |x W^T - (x / s) Q(W s)^T|^2 (ModelOpt ``awq_lite``). With D = W - Q(W s) / s that sum equals
trace(D H D^T), H = X^T X: tokens enter once, through H, instead of once per alpha. Projections that share their input
(q/k/v, gate/up of one expert) share one scale, as runtimes demand; ModelOpt searches them apart and averages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from toolchain.codecs import int4_awq

ALPHAS = tuple(step / 10 for step in range(11))


@dataclass
class InputStatistics:
    """Sums over the tokens that reached one input."""

    tokens: int = 0
    absolute: torch.Tensor | None = None
    """[K] sum of |x|, float32."""
    gram: torch.Tensor | None = None
    """[K, K] sum of x^T x, float32."""

    def add(self, x: torch.Tensor) -> None:
        """Add [..., K] activations."""
        rows = x.detach().flatten(0, -2)
        if not len(rows):
            return
        self.tokens += len(rows)
        rows = rows.float()
        gram, absolute = rows.T @ rows, rows.abs().sum(0)
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.absolute = absolute if self.absolute is None else self.absolute.add_(absolute)


@dataclass(frozen=True)
class Group:
    """Linears that share one input, and the norm that may take their scale (None: stored beside each)."""

    paths: tuple[str, ...]
    norm: str | None = None
    statistics: InputStatistics = field(default_factory=InputStatistics)


def collect(model: nn.Module, groups: list[Group], forward: Callable[[], None]) -> None:
    """Fill the statistics of ``groups`` by one pass over the calibration data."""
    hooks = []
    for group in groups:
        module = model.get_submodule(group.paths[0])
        hooks.append(module.register_forward_pre_hook(_adder(group.statistics)))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()


def _adder(statistics: InputStatistics) -> Any:
    def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        statistics.add(args[0])

    return add


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


def apply(model: nn.Module, group: Group, scale: torch.Tensor) -> None:
    """Divide the group's input by ``scale`` and multiply its weights with it.

    With a norm: the norm's weight takes the division. The factor that really resulted after rounding to the norm's
    dtype is what the weights are multiplied with, so rounding the norm costs nothing.
    """
    modules: list[Any] = [model.get_submodule(path) for path in group.paths]
    dtype = modules[0].weight.dtype
    factor = (1.0 / scale).to(dtype)
    if group.norm is not None:
        norm: Any = model.get_submodule(group.norm)
        folded = (norm.weight.float() * factor.float()).to(norm.weight.dtype)
        usable = (norm.weight != 0) & (folded != 0)
        effective = torch.where(usable, folded.float() / norm.weight.float(), torch.ones_like(scale))
        norm.weight.data = torch.where(usable, folded, norm.weight.data)
    else:
        effective = factor.float()
    for module in modules:
        module.weight.data = (module.weight.float() / effective).to(dtype)
        if group.norm is None:
            module.input_quantizer._enable_pre_quant_scale = True
            module.input_quantizer.pre_quant_scale = factor.clone()
        _recalibrate(module)


def _recalibrate(module: Any) -> None:
    """The weight changed: let its quantizer take the new group maxima."""
    from modelopt.torch.quantization.model_calib import max_calibrate

    module.weight_quantizer.reset_amax()
    max_calibrate(module.weight_quantizer, lambda quantizer: quantizer(module.weight), distributed_sync=False)
