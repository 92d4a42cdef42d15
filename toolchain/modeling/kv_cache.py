"""FP8 KV cache emulation: keys and values are rounded to E4M3 under their stored scales before attention sees them.

The rounding sits in the attention interface of transformers, after rotary embedding, where ModelOpt's
``k_bmm_quantizer`` and ``v_bmm_quantizer`` sit too. Values that were rounded once stay as they are when a decode step
rounds the whole cache again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolchain.codecs.fp8 import fake_quantize
from toolchain.core.errors import ToolchainError

INTERFACE = "toolchain_fp8_kv"


def emulate_fp8_kv_cache(model: Any, scales: dict[str, dict[str, float]]) -> None:
    """``scales`` maps attention module path -> {"k_scale", "v_scale"}; both or neither must be there."""
    if model.config._attn_implementation != "sdpa":
        raise ToolchainError(
            f"FP8 KV cache emulation needs scaled_dot_product_attention, this model runs "
            f"{model.config._attn_implementation!r} attention",
            hint="load with emulate_activations=False, or quantize with --kv-cache none",
            code="TC-510",
        )
    for path, pair in scales.items():
        if set(pair) != {"k_scale", "v_scale"}:
            raise ToolchainError(
                f"{path} has only {sorted(pair)}, expected k_scale and v_scale", code="TC-305"
            )
        module = model.get_submodule(path)
        module.toolchain_k_scale, module.toolchain_v_scale = pair["k_scale"], pair["v_scale"]
    _register()
    model.set_attn_implementation(INTERFACE)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(INTERFACE, _attention)
    AttentionMaskInterface.register(INTERFACE, sdpa_mask)


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if hasattr(module, "toolchain_k_scale"):
        key = fake_quantize(key, module.toolchain_k_scale)
        value = fake_quantize(value, module.toolchain_v_scale)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)
