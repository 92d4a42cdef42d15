"""One layer of experts, four ways: ours, BF16 transformers, and dequantize-then-multiply; all checked in float64."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.layers import MoeLayer, stored
from benchmarks.kernels.limits import limit_s
from toolchain.codecs import get_codec
from toolchain.core.progress import Silent
from toolchain.kernels.kinds import kind_of
from toolchain.kernels.launch import Activation
from toolchain.kernels.packing import pack
from toolchain.kernels.settings import candidates, default
from toolchain.kernels.table import settings_of
from toolchain.modeling.packed.chooser import Chooser, processors_of
from toolchain.modeling.packed.experts import FusedExperts
from toolchain.modeling.packed.tuning import seconds_of, tune

CHECKED = 4
"""Tokens that are compared with float64."""
LOOSE = 0.06
"""Relative RMS of formats that round their inputs: E4M3 and E2M1 ties that fall the other way."""
TIGHT = 0.01
"""Relative RMS of weight-only ones: BF16 between the two multiplications, and BF16 outputs."""


VARIANTS = {"none": "W4A16", "nvfp4": "W4A4"}
"""By what becomes of the inputs; all others are FP8, W8A8."""


def random_ids(layer: MoeLayer, tokens: int, device: torch.device) -> torch.Tensor:
    """int64 [tokens, top_k]."""
    scores = torch.rand((tokens, layer.experts), generator=torch.Generator().manual_seed(tokens))
    return scores.topk(layer.top_k, dim=-1).indices.to(device)


class Ours:
    """``FusedExperts`` over random weights; the stored tensors are kept for the other ways."""

    def __init__(self, layer: MoeLayer, format: str, device: torch.device) -> None:
        self.layer, self.format, self.device = layer, format, device
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        kind = kind_of(format, capability)
        assert kind is not None
        shape = {
            "gate": (layer.inner, layer.hidden),
            "up": (layer.inner, layer.hidden),
            "down": (layer.hidden, layer.inner),
        }
        self.parts = [
            {name: stored(format, *size, device) for name, size in shape.items()}
            for _ in range(layer.experts)
        ]
        for part in self.parts:
            for key in ("weight_scale_2", "input_scale"):
                if key in part["gate"]:
                    part["up"][key] = part["gate"][key]
        dtype = torch.bfloat16
        self.gate_up = pack(kind, [[part["gate"], part["up"]] for part in self.parts], dtype)
        self.down = pack(kind, [[part["down"]] for part in self.parts], dtype)
        self.chooser = Chooser(processors=processors_of(device))
        self.module = FusedExperts(
            self.gate_up, self.down, Activation(), self.chooser, scales_input=False, top_k=layer.top_k
        )

    def tune(self, tokens: int, *, quick: bool) -> dict[str, Any]:
        pick = (lambda *shape: iter([default(*shape)])) if quick else candidates
        found = tune(self.module, tokens=[tokens], device=self.device, progress=Silent(), pick=pick)
        self.chooser.use(settings_of(found.table))
        return {"tried": found.tried, "failed": found.failed, "settings": found.table}

    def dequantized(self, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codec, part = get_codec(self.format), self.parts[expert]
        gate, up, down = (codec.unpack(part[name], dtype) for name in ("gate", "up", "down"))
        return gate, up, down

    def plain(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Dequantize-then-multiply: every expert that has tokens is decoded to BF16, then multiplied by torch."""
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate, up, down = self.dequantized(expert, x.dtype)
            rows = x[token]
            inner = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
            out.index_add_(0, token, (inner @ down.T) * weights[token, slot, None].to(x.dtype))
        return out

    def reference(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """float64, inputs rounded as the codec does where the kernels round them."""
        out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        codec, rounds = get_codec(self.format), self.gate_up.kind.rounding != "none"

        def seen(value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
            return (codec.quantize_input(value.float(), tensors) if rounds else value).double()

        for token, chosen in enumerate(ids.tolist()):
            for slot, expert in enumerate(chosen):
                gate, up, down = (item.double() for item in self.dequantized(expert, torch.float32))
                row = seen(x[token], self.parts[expert]["gate"])
                inner = torch.nn.functional.silu(row @ gate.T) * (row @ up.T)
                result = seen(inner.to(torch.bfloat16), self.parts[expert]["down"]) @ down.T
                out[token] += result * weights[token, slot].double()
        return out


def measure(
    ours: Ours,
    tokens: int,
    bf16: Callable[..., torch.Tensor] | None,
    limits: dict[str, float],
    *,
    quick: bool,
) -> dict[str, Any]:
    """One row of the table. Raises AssertionError when ours is not what float64 says."""
    layer, device = ours.layer, ours.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn((tokens, layer.hidden), device=device).to(dtype)
    ids = random_ids(layer, tokens, device)
    weights = torch.rand(ids.shape, device=device)
    tuned = ours.tune(tokens, quick=quick)
    few = slice(0, CHECKED)
    out = ours.module(x, ids, weights)
    expected = ours.reference(x[few], ids[few], weights[few])
    error = float((out[few].double() - expected).norm() / expected.norm())
    allowed = TIGHT if ours.gate_up.kind.rounding == "none" else LOOSE
    assert error <= allowed, f"{layer.name} {ours.format} {tokens}: off by {error:.3f} relative RMS"
    seconds, captured = seconds_replayed(lambda: ours.module(x, ids, weights), device)
    bf16_s, bf16_captured = seconds_replayed(lambda: bf16(x, ids, weights), device) if bf16 else (None, False)
    limit, bound = limit_s(layer, ours.gate_up, ours.down, ids, limits)
    return {
        "layer": layer.name,
        "format": ours.format,
        "variant": VARIANTS.get(ours.gate_up.kind.rounding, "W8A8"),
        "tokens": tokens,
        "seconds": seconds,
        "captured": captured,
        "bf16_s": bf16_s,
        "bf16_captured": bf16_captured,
        "dequantize_s": seconds_of(lambda: ours.plain(x, ids, weights), device),
        "limit_s": limit,
        "bound": bound,
        "error": error,
        **tuned,
    }


def seconds_replayed(call: Callable[[], Any], device: torch.device) -> tuple[float, bool]:
    """Median seconds of ``call`` as serving runs it, replayed from a CUDA graph, and whether it could be captured:
    launches from Python take longer than a layer's few tokens."""
    if device.type != "cuda":
        return seconds_of(call, device), False
    current = torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    try:
        call()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.set_stream(current)
        return seconds_of(call, device), False
    return seconds_of(graph.replay, device), True


def transformers_experts(layer: MoeLayer, device: torch.device) -> Callable[..., torch.Tensor]:
    """transformers' own experts of Qwen3-MoE in BF16, with its grouped matmul."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=layer.hidden, moe_intermediate_size=layer.inner, num_experts=layer.experts,
        num_experts_per_tok=layer.top_k,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        module = Qwen3MoeExperts(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=layer.hidden**-0.5)
    module.requires_grad_(False)
    return lambda x, ids, weights: module(x, ids, weights.to(x.dtype))


def config_directory(config: dict[str, Any]) -> tempfile.TemporaryDirectory[str]:
    """A directory that holds nothing but config.json."""
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "config.json").write_text(json.dumps(config))
    return folder
