"""Zeros stay zeros while a sparse model is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


class ZeroHold:
    """Where parameters were zero at the start. ``apply`` after every optimizer step, or ``attach`` to an optimizer.

    Optimizers move zeros: weight decay does not, gradients and their moments do. Masks are of the local shards of
    DTensors, one bool per number.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._held = [(parameter, _local(parameter) == 0) for parameter in parameters]

    @torch.no_grad()
    def apply(self, *_: Any) -> None:
        """Set to zero what was zero at the start."""
        for parameter, zeros in self._held:
            _local(parameter).masked_fill_(zeros, 0.0)

    __call__ = apply

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """``apply`` after every step of ``optimizer``; the result's ``remove()`` ends it."""
        return optimizer.register_step_post_hook(self.apply)


def hold_zeros(parameters: Iterable[nn.Parameter] | Mapping[str, nn.Parameter]) -> ZeroHold:
    """Remember where ``parameters`` (those of the sparse matrices, as they are trained: after FSDP2 has cut them) are
    zero now."""
    values = parameters.values() if isinstance(parameters, Mapping) else parameters
    return ZeroHold(values)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """The numbers that this process has of a parameter, sharing its memory."""
    from torch.distributed.tensor import DTensor

    data = parameter.data
    return data.to_local() if isinstance(data, DTensor) else data
