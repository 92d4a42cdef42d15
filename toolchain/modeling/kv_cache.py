"""KV cache emulation: keys and values are rounded as their stored form would before attention sees them.

The rounding sits in the attention interface of transformers, after rotary embedding, where ModelOpt's
``k_bmm_quantizer`` and ``v_bmm_quantizer`` sit too. Values that were rounded once stay as they are when a decode step
rounds the whole cache again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from toolchain.codecs import e2m1, fp8
from toolchain.core.errors import ToolchainError
from toolchain.modeling.emulation import Emulation

INTERFACES = {"sdpa": "toolchain_quantized_kv", "eager": "toolchain_quantized_kv_eager"}
"""Attention of transformers -> the name of ours, which rounds and calls it."""

ROUNDING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "FP8": fp8.fake_quantize,
    "NVFP4": e2m1.fake_quantize,
}
"""``kv_cache_quant_algo`` -> what keys and values become under their scale; NVFP4 in blocks of 16 along head_dim."""


def emulate_kv_cache(
    model: Any, quant_algo: str, scales: dict[str, dict[str, float]], switches: Emulation | None = None
) -> None:
    """``scales`` maps attention module path -> {"k_scale", "v_scale"}; both or neither must be there.

    Without any, every attention with a k_proj and a v_proj is given 1.0, as runtimes do for FP8. ``switches`` leave the
    rounding out of single forwards later.
    """
    switches = switches or Emulation()
    if quant_algo not in ROUNDING:
        raise ToolchainError(
            f"the checkpoint was made for a {quant_algo} KV cache, which is not emulated here ({', '.join(ROUNDING)})",
            hint="evaluate with --emulation weights, or load with emulate_activations=False",
            code="TC-510",
        )
    scales = scales or {path: {"k_scale": 1.0, "v_scale": 1.0} for path in _attentions(model)}
    kind = model.config._attn_implementation
    if scales and kind not in INTERFACES:
        raise ToolchainError(
            f"{quant_algo} KV cache emulation sits in front of {' or '.join(INTERFACES)} attention, this model runs "
            f"{kind!r}",
            hint="evaluate with --emulation weights, or quantize with --kv-cache none",
            code="TC-510",
        )
    for path, pair in scales.items():
        if set(pair) != {"k_scale", "v_scale"}:
            raise ToolchainError(
                f"{path} has only {sorted(pair)}, expected k_scale and v_scale", code="TC-305"
            )
        module = model.get_submodule(path)
        pair_of_scales = (torch.tensor(pair[name]) for name in ("k_scale", "v_scale"))
        module.toolchain_kv = (switches, quant_algo, *pair_of_scales)
    switches.rounds_kv_cache = bool(scales)
    if scales:
        _register(kind)
        model.set_attn_implementation(INTERFACES[kind])


def _attentions(model: nn.Module) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if hasattr(module, "k_proj") and hasattr(module, "v_proj")
    ]


def _register(kind: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register(INTERFACES[kind], _sdpa if kind == "sdpa" else _eager)
    AttentionMaskInterface.register(INTERFACES[kind], sdpa_mask if kind == "sdpa" else eager_mask)


def _rounded(module: Any, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not hasattr(module, "toolchain_kv"):
        return key, value
    switches, quant_algo, k_scale, v_scale = module.toolchain_kv
    if not switches.kv_cache:
        return key, value
    rounding = ROUNDING[quant_algo]
    return rounding(key, k_scale.to(key.device)), rounding(value, v_scale.to(value.device))


def _sdpa(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, *_rounded(module, key, value), *args, **kwargs)


def _eager(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The model's own attention function: gpt-oss has one, with attention sinks, and no other."""
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, *_rounded(module, key, value), *args, **kwargs)
