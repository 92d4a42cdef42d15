"""What a codec is: one stored format's packing, unpacking and activation emulation, on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from toolchain.formats import Format


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What calibration found for one Linear. Amax values are float32 scalars (0-dim)."""

    weight_amax: torch.Tensor | None = None
    """Largest |weight| of the tensor, or of its fused siblings together; None for block-only formats."""
    input_amax: torch.Tensor | None = None
    """Largest |input|; None for weight-only formats."""
    pre_quant_scale: torch.Tensor | None = None
    """[in_features]: factor on the input (AWQ). The weight handed to ``pack`` is already divided by it."""


def usable_amax(amax: torch.Tensor) -> torch.Tensor:
    """float32 amax with 1 for 0: a tensor of zeros (a pruned expert) needs some positive scale, and any will do."""
    amax = amax.float()
    return torch.where(amax > 0, amax, torch.ones_like(amax))


class Codec(Protocol):
    format: Format

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        """[out, in] floating weight -> suffix -> tensor as stored. Source: ModelOpt 0.47 ``export/quant_utils.py``."""

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Stored tensors of one Linear -> its [out, in] weight. ``pre_quant_scale`` is not undone: it is applied to
        the input."""

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[..., in] activation -> the activation that the target's kernels would compute on, same dtype."""
