"""NVFP4 fake quantization on any device, registered with ModelOpt.

ModelOpt's own NVFP4 kernels need CUDA (``amax must be a CUDA tensor``). ``register_quant_backend`` is its public hook;
the arithmetic is that of our codec, which is bit-exact with ModelOpt's packing, so the model in memory computes on the
numbers that ship.
"""

from __future__ import annotations

from typing import Any

import torch

from toolchain.codecs import e2m1

NAME = "toolchain_nvfp4"


def register() -> None:
    """Make the backend known to ModelOpt; once per process is enough, more does no harm."""
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    if NAME not in tensor_quantizer._QUANT_FUNCTIONAL_BACKENDS:
        tensor_quantizer.register_quant_backend(NAME, _fake_quantize)


def use_in(quant_cfg: list[dict[str, Any]]) -> None:
    """Point every E2M1 quantizer of a ModelOpt ``quant_cfg`` at the backend."""
    for entry in quant_cfg:
        settings = entry.get("cfg")
        if isinstance(settings, dict) and tuple(_pair(settings.get("num_bits"))) == (2, 1):
            settings["backend"] = NAME


def _pair(num_bits: Any) -> Any:
    return num_bits if isinstance(num_bits, list | tuple) else ()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return e2m1.fake_quantize(inputs, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def _fake_quantize(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Entry point that ModelOpt calls: inputs [..., K], the quantizer holds the calibrated ``amax``."""
    amax = quantizer.amax if quantizer.amax is not None else inputs.abs().amax()
    return _StraightThrough.apply(inputs, e2m1.global_scale(amax.to(inputs.device)))
