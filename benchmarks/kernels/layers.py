"""Layers in the shapes of published models, with random weights in every format."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int


LAYERS = (
    MoeLayer(name="Qwen3-30B-A3B", experts=128, top_k=8, hidden=2048, inner=768),
    MoeLayer(name="Mixtral-8x7B", experts=8, top_k=2, hidden=4096, inner=14336),
    MoeLayer(name="DeepSeek-V3", experts=256, top_k=8, hidden=7168, inner=2048),
)
SMOKE = MoeLayer(name="smoke", experts=4, top_k=2, hidden=256, inner=128)
"""To see that everything runs, in Triton's interpreter; its figures mean nothing."""
TOKENS = (1, 8, 64, 512, 4096)
FORMATS = ("nvfp4", "mxfp4", "int4_awq", "fp8", "fp8_per_channel_per_token", "fp8_block")


def stored(format: str, n: int, k: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tensors of one [n, k] matrix, of the size that trained weights have."""

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    def around_one(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device) + 0.5

    step = torch.tensor(0.5 / k**0.5, device=device)
    if format in ("nvfp4", "w4a16_nvfp4"):
        scales = around_one(n, k // 16).to(torch.float8_e4m3fn)
        inputs = torch.tensor(6.0 / 2688, device=device)
        return {
            "weight": codes(n, k // 2),
            "weight_scale": scales,
            "weight_scale_2": step,
            "input_scale": inputs,
        }
    if format == "mxfp4":
        return {"weight": codes(n, k // 2), "weight_scale": (codes(n, k // 32) % 3) + 119}
    if format.startswith("int4"):
        return {"weight": codes(n // 2, k), "weight_scale": around_one(n, k // 128) * step}
    weight = torch.randn((n, k), device=device).to(torch.float8_e4m3fn)
    if format == "fp8":
        return {"weight": weight, "weight_scale": step, "input_scale": torch.tensor(6.0 / 448, device=device)}
    if format == "fp8_block":
        return {"weight": weight, "weight_scale_inv": around_one(-(-n // 128), -(-k // 128)) * step}
    return {"weight": weight, "weight_scale": around_one(n) * step}
