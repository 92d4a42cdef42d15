"""Fused expert tensors <-> one set of tensors per expert and projection, as a Linear of its own would store them.

ModelOpt's layout: values [E, in', out] and block scales [E, in/16, out], transposed after packing, one scalar for all
experts. The published MXFP4 layout of gpt-oss: ``blocks`` [E, out, in/32, 16] and ``scales`` [E, out, in/32], not
transposed. The columns (rows) of gate_up_proj are gate and up, alternating in gpt-oss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from toolchain.core.errors import ToolchainError
from toolchain.families import Family
from toolchain.families.fused import MXFP4

MX_BLOCK_BYTES = 16
"""Bytes of one block of 32 E2M1 values."""


def split_experts(
    family: Family, module: str, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(module name of one matrix, its tensors by suffix) for every expert and projection of a fused ``module``."""
    weight = tensors.get("weight")
    is_mx = weight is not None and weight.dim() == 4
    experts = next(len(tensor) for tensor in tensors.values() if tensor.dim() > 1)
    for expert, names in enumerate(family.members(module, experts)):
        own = {suffix: _of_expert(suffix, tensor, expert, is_mx) for suffix, tensor in tensors.items()}
        for part, name in enumerate(names):
            yield name, {suffix: _rows(family, tensor, part, len(names)) for suffix, tensor in own.items()}


def _of_expert(suffix: str, tensor: torch.Tensor, expert: int, is_mx: bool) -> torch.Tensor:
    """The tensor of one expert, output dimension first; a scalar is everyone's."""
    if tensor.numel() == 1 and tensor.dim() < 2:
        return tensor.reshape(())
    own = tensor[expert]
    if own.dim() < 2 or suffix == "bias":
        return own
    return own.flatten(1) if is_mx else own.T


def _rows(family: Family, tensor: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    if tensor.dim() == 0 or parts == 1:
        return tensor.contiguous()
    piece = tensor[part::parts] if family.interleaved else tensor.chunk(parts)[part]
    return piece.contiguous()


def fuse_experts(
    family: Family, module: str, format_name: str, matrices: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Inverse of ``split_experts``: tensor name -> tensor, from the matrices' tensors in the order of ``members``.

    ToolchainError TC-208 when the matrices do not share the scalars that are stored once.
    """
    parts = len(family.members(module, 1)[0])
    groups = [matrices[start : start + parts] for start in range(0, len(matrices), parts)]
    fused = {}
    for suffix in matrices[0]:
        name = family.join(module, suffix, format_name)
        if matrices[0][suffix].dim() == 0:
            fused[name] = _common(name, [matrix[suffix] for matrix in matrices])
            continue
        stacked = torch.stack([_joined(family, [matrix[suffix] for matrix in group]) for group in groups])
        if stacked.dim() == 2:  # biases
            pass
        elif format_name != MXFP4:
            stacked = stacked.transpose(1, 2)
        elif suffix == "weight":
            stacked = stacked.unflatten(2, (-1, MX_BLOCK_BYTES))
        fused[name] = stacked.contiguous()
    return fused


def _joined(family: Family, pieces: list[torch.Tensor]) -> torch.Tensor:
    if len(pieces) == 1:
        return pieces[0]
    return torch.stack(pieces, dim=1).flatten(0, 1) if family.interleaved else torch.cat(pieces)


def _common(name: str, scalars: list[torch.Tensor]) -> torch.Tensor:
    first = scalars[0]
    if any(not torch.equal(first, other) for other in scalars[1:]):
        raise ToolchainError(
            f"{name}: the experts have {len({float(item) for item in scalars})} different scales, one is stored",
            hint="their ranges must be merged before packing",
            code="TC-208",
        )
    return first
