"""Write tensors to sharded safetensors files in the layout of the hub, a shard at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5 * 10**9
"""Upper bound of one shard, as transformers' ``save_pretrained`` uses."""


def write_shards(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write ``model-XXXXX-of-YYYYY.safetensors`` and the index (or one ``model.safetensors``); returns bytes of data.

    Holds at most one shard in memory. A tensor larger than ``shard_bytes`` gets a shard of its own.
    """
    written: list[tuple[Path, list[str]]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        path = directory / f"shard-{len(written):05d}.safetensors"
        _save(path, pending)
        written.append((path, sorted(pending)))
        pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > shard_bytes:
            flush()
        pending[name] = tensor
        pending_bytes += size
        total += size
    flush()
    _name_shards(directory, written, total)
    return total


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Views into one storage (experts of a fused parameter) must be written as tensors of their own.
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(own, path, {"format": "pt"})
    except SafetensorError as error:
        raise ToolchainError(
            f"{path} cannot be written: {error}",
            hint="check the space and the limits of its file system",
            code="TC-002",
        ) from error
    # safetensors 0.8 leaves its temporary file's 0600, which a container's own user cannot read; streamed shards have
    # these bits as well.
    path.chmod(path.stat().st_mode | 0o044)


def _name_shards(directory: Path, written: list[tuple[Path, list[str]]], total: int) -> None:
    """The number of shards is known only at the end."""
    weight_map: dict[str, str] = {}
    for final, (path, names) in zip(shard_names(len(written)), written, strict=True):
        path.rename(directory / final)
        weight_map |= dict.fromkeys(names, final)
    write_index(directory, weight_map, total)


def shard_names(count: int) -> list[str]:
    """File names of ``count`` shards, as on the hub."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def write_index(directory: Path, weight_map: dict[str, str], total: int) -> None:
    """The index of several shards (tensor name -> file); a single one goes without. ``total``: bytes of data."""
    if len(set(weight_map.values())) > 1:
        index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        atomic_write_json(directory / "model.safetensors.index.json", index_json)
