"""Weights of every format that the kernels read, made by the codecs, and what they stand for in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from toolchain.codecs import get_codec
from toolchain.codecs.base import Calibrated
from toolchain.kernels.kinds import KINDS, Kind
from toolchain.kernels.packing import Packed, pack


@dataclass(frozen=True, kw_only=True)
class Case:
    packed: Packed
    weights: torch.Tensor
    """float64 [E, N, K]: the codec's own unpacking."""


def stored(
    format: str, n: int, k: int, seed: int, *, bias: bool = False, channel: bool = True
) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold of one [n, k] matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator).add(0.1)
    weight[:, : k // 4] *= 30  # scales of some range
    channels = torch.rand(k, generator=generator).add(0.5) if channel and format == "int4_awq" else None
    calibrated = Calibrated(input_amax=torch.tensor(3.0 + seed % 5), pre_quant_scale=channels)
    tensors = dict(get_codec(format).pack(weight, calibrated))
    if bias:
        tensors["bias"] = torch.randn(n, generator=generator)
    return tensors


def make(
    format: str,
    *,
    experts: int,
    n: int,
    k: int,
    gated: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    kind: Kind | None = None,
) -> Case:
    """``n`` rows of the product: with ``gated`` half of them are gate's, half up's."""
    kind = kind or KINDS[format]
    codec = get_codec(format)
    sets, values = [], []
    for index in range(experts):
        parts = 2 if gated else 1
        tensors = [stored(format, n // parts, k, 100 * index + part, bias=bias) for part in range(parts)]
        for part in tensors[1:]:
            for shared in ("pre_quant_scale", "input_scale"):
                if shared in tensors[0]:
                    part[shared] = tensors[0][shared]
        sets.append(tensors)
        unpacked = [codec.unpack(part, torch.float32).double() for part in tensors]
        values.append(torch.stack(unpacked, 1).flatten(0, 1) if gated else unpacked[0])
    return Case(packed=pack(kind, sets, dtype), weights=torch.stack(values))
