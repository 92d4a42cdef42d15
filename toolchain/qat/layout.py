"""Where the parameters of a student stand in the files of its source, and in which dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.errors import ToolchainError
from toolchain.families import Family
from toolchain.models.types import TensorInfo

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the dtypes that weights are trained from; other tensors are copied."""


def parameter_names(family: Family, info: TensorInfo) -> Iterator[str]:
    """Names in the model of all that the tensor ``info`` of the source holds: one, or one per expert and projection."""
    module, suffix = family.split(info.name)
    if family.is_fused(module):
        for group in family.members(module, info.shape[0]):
            yield from (f"{family.to_module(name)}.{suffix}" for name in group)
    else:
        yield f"{family.to_module(module)}.{suffix}"


def stored_dtypes(reader: CheckpointReader, family: Family) -> dict[str, torch.dtype]:
    """Parameter name -> dtype that the source has it in (a quantized source: that of the values it stands for)."""
    return {
        name: DTYPES[info.dtype]
        for info in reader.infos.values()
        if info.dtype in DTYPES
        for name in parameter_names(family, info)
    }


def require_stored(model: nn.Module, names: set[str], stored: dict[str, torch.dtype]) -> None:
    """ToolchainError TC-252 when a parameter of ``names`` would be written nowhere. Shared ones have several names."""
    aliases: dict[int, set[str]] = {}
    for name, item in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(item), set()).add(name)
    homeless = sorted(min(found) for found in aliases.values() if found & names and not found & stored.keys())
    if homeless:
        raise ToolchainError(
            f"{len(homeless)} parameters of the model are in no file of its source: {homeless[:3]}",
            hint="the family's declaration and the model disagree: see CONTRIBUTING, `add a family`",
            code="TC-252",
        )
