"""Inputs of quantized Linears as the target sees them: scaled by ``pre_quant_scale``, then rounded by its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from toolchain.codecs import Codec, scale_input
from toolchain.modeling.emulation import Emulation

SUFFIXES = ("input_scale", "pre_quant_scale")
NOT_ROUNDED = "bf16"
"""``Format.activation`` of weight-only formats."""


@dataclass(frozen=True)
class QuantizedInput:
    """What happens to the input of one Linear."""

    module: nn.Module
    codec: Codec
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, module: nn.Module, codec: Codec, stored: Mapping[str, torch.Tensor]) -> QuantizedInput:
        return cls(module, codec, {suffix: stored[suffix] for suffix in SUFFIXES if suffix in stored})

    def attach(
        self, device: torch.device, *, emulate: bool, switches: Emulation | None = None
    ) -> RemovableHandle | None:
        """Hook it before the Linear. Channel scales are mathematics of the checkpoint: without ``emulate`` they are
        applied all the same, and only the rounding is left out. Returns what takes the hook away, if there is one.

        ``switches`` leave the rounding out of single forwards later."""
        rounded = emulate and self.codec.format.activation != NOT_ROUNDED
        switches = switches or Emulation()
        switches.rounds_activations |= rounded
        if rounded or "pre_quant_scale" in self.tensors:
            moved = {suffix: tensor.to(device) for suffix, tensor in self.tensors.items()}
            hook = partial(_before, self.codec if rounded else None, moved, switches)
            return self.module.register_forward_pre_hook(hook)
        return None


def _before(
    codec: Codec | None,
    tensors: dict[str, torch.Tensor],
    switches: Emulation,
    module: nn.Module,
    args: tuple[Any, ...],
) -> Any:
    x = scale_input(args[0], tensors)
    return (codec.quantize_input(x, tensors) if codec and switches.activations else x, *args[1:])
