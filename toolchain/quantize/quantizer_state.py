"""The state of quantizers as tensors by name: with it a calibrated model can be had again without calibrating.

Settings are the plan's, put on from ModelOpt's presets each time (``quantizers.insert``). What calibration found is a
handful of buffers: ranges of tensors (``_amax``), channel scales (``_pre_quant_scale``). Ranges that follow the weights
(``current_ranges.py``) are no state, and of learned block scales the range of the tensor is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from toolchain.core.errors import ToolchainError
from toolchain.quantize import current_ranges

FILE = "quantizers.safetensors"
AMAX, PRE_QUANT_SCALE = "_amax", "_pre_quant_scale"


def collect(model: nn.Module) -> dict[str, torch.Tensor]:
    """``<path of a quantizer>.<buffer>`` -> tensor on the CPU, for all that ``restore`` needs."""
    return {
        f"{path}.{name}": tensor.detach().cpu().clone()
        for path, quantizer in _quantizers(model)
        for name, tensor in _state(quantizer).items()
    }


def restore(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Inverse of ``collect`` on a model with the same quantizers, fresh. ToolchainError TC-252 for other ones."""
    quantizers = dict(_quantizers(model))
    device = next(model.parameters()).device
    foreign = [key for key in state if key.rpartition(".")[0] not in quantizers]
    for key in state.keys() - set(foreign):
        path, _, name = key.rpartition(".")
        quantizers[path].register_buffer(name, state[key].to(device).clone())
    lacking = [path for path, quantizer in quantizers.items() if _lacks_range(quantizer)]
    if foreign or lacking:
        raise ToolchainError(
            f"the stored quantizers are not those of this plan: {len(foreign)} belong to no module {foreign[:3]}, "
            f"{len(lacking)} have no range {lacking[:3]}",
            hint="use the plan that they were made by, or calibrate and train again",
            code="TC-252",
        )


def _quantizers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from modelopt.torch.quantization.nn import TensorQuantizer

    for path, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            yield path, module


def _state(quantizer: Any) -> dict[str, torch.Tensor]:
    found = dict(quantizer.named_buffers(recurse=False))
    if getattr(quantizer, "_lsq", False):
        return {AMAX: quantizer.global_amax}
    if not quantizer.is_enabled or current_ranges.has_own_ranges(quantizer):
        found.pop(AMAX, None)
    return found


def _lacks_range(quantizer: Any) -> bool:
    if not quantizer.is_enabled or quantizer._dynamic or quantizer._use_constant_amax:
        return False
    return not (current_ranges.has_own_ranges(quantizer) or hasattr(quantizer, AMAX))
