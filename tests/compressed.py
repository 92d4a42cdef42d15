"""Checkpoints in compressed-tensors' layout, written from the definition of its formats.

The layouts are those of llm-compressor 0.14.0.1 with compressed-tensors 0.19.0, whose own checkpoints of the same tiny
models were looked at: names, dtypes, shapes, config. ``decoded`` is what that layout means, computed from what is
stored: for NVFP4 code * (block scale / global scale), for INT4 (nibble - 8) * scale.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
RENAMED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Mixtral's experts keep the module names of transformers there."""


def _args(bits: int, kind: str, strategy: str, **rest: Any) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, "group_size": None,
        "block_structure": None, "actorder": None, **rest,
    }  # fmt: skip


SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "NVFP4": (
        _args(4, "float", "tensor_group", group_size=16),
        _args(4, "float", "tensor_group", group_size=16, dynamic="local"),
    ),
    "NVFP4A16": (_args(4, "float", "tensor_group", group_size=16), None),
    "FP8": (_args(8, "float", "tensor"), _args(8, "float", "tensor")),
    "FP8_DYNAMIC": (_args(8, "float", "channel"), _args(8, "float", "token", dynamic=True)),
    "FP8_BLOCK": (
        _args(8, "float", "block", block_structure=[128, 128]),
        _args(8, "float", "group", group_size=128, dynamic=True),
    ),
    "W4A16": (_args(4, "int", "group", group_size=128), None),
    "W8A8": (_args(8, "int", "channel"), _args(8, "int", "token", dynamic=True)),
}
"""Scheme -> (weights, input_activations) of its config group."""


def write(
    source: Path,
    directory: Path,
    scheme: str,
    *,
    kv_cache: bool = False,
    change: Callable[[Any], Any] | None = None,
) -> Tensors:
    """``source`` with every Linear but routers and head in ``scheme``; returns module -> decoded weight, float32.

    ``change`` gets the ``quantization_config`` before it is written.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, directory)
    tensors, written, decoded = load_file(source / "model.safetensors"), {}, {}
    linears = {name.removesuffix(".weight") for name, tensor in tensors.items() if _is_linear(name, tensor)}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module not in linears:
            written[name] = tensor
            continue
        amax = max(
            float(tensors[f"{other}.weight"].abs().max()) for other in _siblings(module) if other in linears
        )
        stored, decoded[module] = PACK[scheme](tensor.float(), amax)
        written |= {f"{_renamed(module)}.{suffix}": value for suffix, value in stored.items()}
    config = json.loads((directory / "config.json").read_text())
    if kv_cache:
        for layer in range(config["num_hidden_layers"]):
            for kind in "kv":
                written[f"model.layers.{layer}.self_attn.{kind}_scale"] = torch.tensor([0.125]).bfloat16()
    save_file(written, directory / "model.safetensors", {"format": "pt"})
    weights, inputs = copy.deepcopy(SCHEMES[scheme])
    plain = sorted({name.removesuffix(".weight") for name in tensors} - linears)
    quantization = {
        "quant_method": "compressed-tensors", "version": "0.19.0", "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs,
                        "output_activations": None}
        },
        "ignore": [name for name in plain if name.endswith((".gate", "lm_head"))],
        "kv_cache_scheme": _args(8, "float", "tensor") if kv_cache else None, "sparsity_config": {},
        "transform_config": {},
    }  # fmt: skip
    if change:
        change(quantization)
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return decoded


def _is_linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and not re.search(r"embed|lm_head|norm|\.gate\.weight|router", name)


def _siblings(module: str) -> tuple[str, ...]:
    parent, _, own = module.rpartition(".")
    groups = (*FUSED, ("w1", "w3"))
    group = next((group for group in groups if own in group), (own,))
    return tuple(f"{parent}.{name}" for name in group)


def _renamed(module: str) -> str:
    parent, _, own = module.rpartition(".")
    return f"{parent}.{RENAMED.get(own, own)}"


def _nvfp4(weight: torch.Tensor, amax: float, *, inputs: bool = True) -> tuple[Tensors, torch.Tensor]:
    divisor = torch.tensor([6 * 448 / amax]).bfloat16().float()
    blocks = weight.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1) / 6 * divisor).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    scaled = blocks / (scale.float() / divisor).unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    values = E2M1[codes] * scaled.sign()
    codes = (codes + 8 * (scaled < 0)).flatten(-2)
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    stored = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": divisor}
    if inputs:
        stored["input_global_scale"] = torch.tensor([352.0])
    return stored, (values * (scale.float() / divisor).unsqueeze(-1)).flatten(-2)


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes under ``scale``, broadcast to the weight, and what they mean."""
    codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, codes.float() * scale


def _fp8_tensor(weight: torch.Tensor, amax: float) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().max() / 448).bfloat16().reshape(1)
    codes, values = _fp8(weight, scale.float())
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor([0.0125]).bfloat16()}, values


def _fp8_channel(weight: torch.Tensor, amax: float) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes, values = _fp8(weight, scale.float())
    return {"weight": codes, "weight_scale": scale}, values


def _fp8_block(weight: torch.Tensor, amax: float) -> tuple[Tensors, torch.Tensor]:
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.empty(rows, columns, dtype=torch.bfloat16)
    wide = torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            cut = (slice(row * 128, (row + 1) * 128), slice(column * 128, (column + 1) * 128))
            scale[row, column] = weight[cut].abs().max() / 448
            wide[cut] = scale[row, column].float()
    codes, values = _fp8(weight, wide)
    return {"weight": codes, "weight_scale": scale}, values


def _int4(weight: torch.Tensor, amax: float) -> tuple[Tensors, torch.Tensor]:
    groups = weight.unflatten(-1, (-1, 128))
    scale = (groups.abs().amax(-1) / 7.5).bfloat16()
    codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7)
    shifted = (codes.flatten(-2) + 8).to(torch.int64)
    words = sum(shifted[:, place::8] << (4 * place) for place in range(8))
    packed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    stored = {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_shape": torch.tensor(list(weight.shape)),
    }
    return stored, (codes * scale.float().unsqueeze(-1)).flatten(-2)


def _int8(weight: torch.Tensor, amax: float) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes * scale.float()


PACK: dict[str, Callable[[torch.Tensor, float], tuple[Tensors, torch.Tensor]]] = {
    "NVFP4": _nvfp4,
    "NVFP4A16": lambda weight, amax: _nvfp4(weight, amax, inputs=False),
    "FP8": _fp8_tensor,
    "FP8_DYNAMIC": _fp8_channel,
    "FP8_BLOCK": _fp8_block,
    "W4A16": _int4,
    "W8A8": _int8,
}
