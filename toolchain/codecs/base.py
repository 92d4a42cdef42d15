"""What a codec is: one stored layout's packing, unpacking and activation emulation, on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from toolchain.core.errors import ToolchainError
from toolchain.formats import Format


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What calibration found for one Linear. Amax values are float32 scalars (0-dim)."""

    weight_amax: torch.Tensor | None = None
    """Largest |weight| of the tensor, or of its fused siblings together; None for block-only formats."""
    input_amax: torch.Tensor | None = None
    """Largest |input|, behind ``pre_quant_scale``; None for weight-only formats."""
    pre_quant_scale: torch.Tensor | None = None
    """[in_features]: factor on the input (AWQ, SmoothQuant). The weight handed to ``pack`` is already divided by it."""

    weight_scale: torch.Tensor | None = None
    """Scales of channels or blocks as the format stores them, when they are decided already; None: from the largest
    magnitude of each."""

    def tensor_amax(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight_amax``, or the weight's own, on its device; 1 for 0."""
        amax = self.weight_amax if self.weight_amax is not None else weight.abs().amax()
        return usable_amax(amax.to(weight.device))

    def require_input_amax(self, format: Format) -> torch.Tensor:
        """``input_amax`` as float32. ToolchainError TC-202 when no token was seen."""
        if self.input_amax is None:
            raise ToolchainError(f"{format.name} needs the calibrated amax of the input", code="TC-202")
        return self.input_amax.float()

    def stored_pre_quant_scale(self) -> dict[str, torch.Tensor]:
        """``pre_quant_scale`` as a tensor to store, if there is one."""
        return {} if self.pre_quant_scale is None else {"pre_quant_scale": self.pre_quant_scale}


def usable_amax(amax: torch.Tensor) -> torch.Tensor:
    """float32 amax with 1 for 0: a tensor of zeros (a pruned expert) needs some positive scale, and any will do."""
    amax = amax.float()
    return torch.where(amax > 0, amax, 1.0)


def scales_of(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """float32 amax / ``largest``, and 1 for 0, as ModelOpt's exporter has it for scales of channels and blocks."""
    amax = amax.float()
    return torch.where(amax > 0, amax / largest, 1.0)


def scale_input(x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[..., in] activation times ``pre_quant_scale``, if one is stored: mathematics of the checkpoint, not rounding."""
    scale = tensors.get("pre_quant_scale")
    return x if scale is None else x * scale.to(x.dtype)


class Codec(Protocol):
    format: Format

    def pack(self, weight: torch.Tensor, calibrated: Calibrated) -> dict[str, torch.Tensor]:
        """[out, in] floating weight -> suffix -> tensor as stored. Source: ModelOpt 0.47 ``export/quant_utils.py``."""

    def unpack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Stored tensors of one Linear -> its [out, in] weight. ``pre_quant_scale`` is not undone: it is applied to
        the input (``scale_input``)."""

    def quantize_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[..., in] activation behind ``scale_input`` -> the one that the target's kernels compute on, same dtype."""
