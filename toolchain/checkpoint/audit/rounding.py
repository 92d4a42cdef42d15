"""How far rounding can move a weight: half of the step that its stored scale leaves around it.

Rounding to nearest under a given scale moves no weight by more than half the distance to the next number, and a weight
that is not clipped is always between two numbers. So for every tensor |decoded - source| is at most ``half_steps``,
element by element, whatever the weights are distributed like; the sum of squares is a bound on the Frobenius error that
no correct rounding exceeds, and that a swapped, stale or wrongly scaled tensor does (theirs is near 1, or the ratio of
the scales). Uniformly distributed roundings come to 1/sqrt(3) of the bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from toolchain.codecs import get_codec, mx
from toolchain.formats import Format

ROWS = 128
"""Matrices are compared in pieces of a multiple of this many rows: blocks of 128 x 128 stay whole."""
PIECE = 4 << 20
"""Elements of a piece: bounds the memory that a large matrix takes."""
QUIET = 1e-3
"""Blocks with less than this part of the mean energy are not called the worst: their error matters to nobody."""


@dataclass(frozen=True, kw_only=True)
class Error:
    """How one matrix differs from its source."""

    relative: float
    """Frobenius norm of the difference, over that of the source."""
    bound: float
    """What rounding to nearest at the stored scales can reach at most, likewise."""
    worst: float
    """The largest relative error of a block (of the format's group of inputs, or 128)."""
    worst_at: tuple[int, int]
    """(row, first column) of that block."""


def compare(
    format: Format, tensors: Mapping[str, torch.Tensor], source: torch.Tensor, factor: torch.Tensor | None
) -> Error:
    """Error of a stored matrix against its ``source`` [out, in].

    ``factor`` [in]: what the stored weight must be multiplied by, because its input is divided by it (or its norm was).
    """
    out_features, in_features = source.shape
    step = max(ROWS, PIECE // max(1, in_features) // ROWS * ROWS)
    group = format.group_size or ROWS
    group = group if in_features % group == 0 else in_features
    sums, worst, mean = [0.0, 0.0, 0.0], (0.0, (0, 0)), _mean_energy(source, group)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        piece = {name: _rows(tensor, out_features, start, stop) for name, tensor in tensors.items()}
        decoded = get_codec(format.name).unpack(piece, torch.float32)
        room = half_steps(format, piece, decoded)
        if factor is not None:
            decoded, room = decoded * factor, room * factor.abs()
        wanted = source[start:stop].float()
        wrong = (decoded - wanted).square_().unflatten(1, (-1, group)).sum(-1)
        right = wanted.square_().unflatten(1, (-1, group)).sum(-1)
        sums = [
            sums[0] + float(wrong.sum(dtype=torch.float64)),
            sums[1] + float(right.sum(dtype=torch.float64)),
            sums[2] + float(room.square().sum(dtype=torch.float64)),
        ]
        ratio = torch.where(right > QUIET * mean, wrong / right, 0.0)
        value = float(ratio.max())
        if value > worst[0]:
            at = divmod(int(ratio.argmax()), ratio.shape[1])
            worst = (value, (start + at[0], at[1] * group))
    scale = sums[1] or 1.0
    return Error(
        relative=(sums[0] / scale) ** 0.5,
        bound=(sums[2] / scale) ** 0.5,
        worst=worst[0] ** 0.5,
        worst_at=worst[1],
    )


def _mean_energy(source: torch.Tensor, group: int) -> float:
    """Mean sum of squares of a block of ``group`` weights."""
    norm = float(torch.linalg.vector_norm(source, dtype=torch.float32))
    return norm * norm / source.numel() * group


def _rows(tensor: torch.Tensor, out_features: int, start: int, stop: int) -> torch.Tensor:
    """The part of a stored tensor that belongs to rows ``start``:``stop``; scalars and channel factors are everyone's.

    Its first dimension is the rows, or a fraction of them (two rows per byte, 128 per block).
    """
    if tensor.dim() == 0 or tensor.numel() == 1:
        return tensor.reshape(()) if tensor.numel() == 1 and tensor.dim() < 2 else tensor
    own = tensor.shape[0]
    if own == out_features:
        return tensor[start:stop]
    per = 2 if own * 2 == out_features else ROWS
    return tensor[start // per : -(-stop // per)]


def half_steps(format: Format, tensors: Mapping[str, torch.Tensor], decoded: torch.Tensor) -> torch.Tensor:
    """[out, in] largest distance between a weight and the number that it was rounded to, by the number.

    E2M1 has steps of 0.5 below 2, 1 below 4, then 2; at 2 and 4 the larger one above counts. E4M3 has three bits of
    mantissa: half a step is at most 1/16 of the number, and 2^-10 below the normal ones. Integers have steps of 1.
    """
    scale = _scale(format, tensors, decoded)
    magnitude = decoded.abs()
    stored = next(item.dtype for item in format.stored if item.suffix == "weight")
    if stored == "F8_E4M3":
        return torch.maximum(magnitude / 16, scale * 2.0**-10)
    if stored == "I8" or format.name in ("int4_awq", "int4_gptq", "w4a8_awq"):
        half = (scale / 2).expand_as(decoded)
        # Expanded to E4M3 for the kernel: a second rounding.
        return half + magnitude / 16 if format.name == "w4a8_awq" else half
    codes = magnitude / scale
    return torch.where(codes < 1.75, 0.25, torch.where(codes < 3.5, 0.5, 1.0)) * scale


def _scale(format: Format, tensors: Mapping[str, torch.Tensor], decoded: torch.Tensor) -> torch.Tensor:
    """The stored scale of each element, broadcastable to [out, in]."""
    found = tensors.get("weight_scale", tensors.get("weight_scale_inv"))
    if found is None:
        raise KeyError(f"{format.name} without weight scales")
    scale = mx.factors(found) if found.dtype == torch.uint8 else found.float()
    if scale.dim() == 4:  # blocks as ModelOpt writes them
        scale = scale.squeeze(3).squeeze(1)
    if scale.dim() == 0:
        return scale
    if scale.dim() == 1:
        return scale.unsqueeze(1)
    if format.name.endswith("nvfp4") or format.name.startswith("w4a8_nvfp4"):
        scale = scale * tensors["weight_scale_2"]
    rows, columns = (-(-size // own) for size, own in zip(decoded.shape, scale.shape, strict=True))
    rows, columns = (ROWS, ROWS) if format.name == "fp8_block" else (rows, columns)
    wide = scale.repeat_interleave(rows, 0)[: decoded.shape[0]]
    return wide.repeat_interleave(columns, 1)[:, : decoded.shape[1]]
