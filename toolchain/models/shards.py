"""Which files of a model directory hold its weights, and whether they are all there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json
from toolchain.models.headers import read_shard
from toolchain.models.types import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_tensors(directory: Path) -> list[TensorInfo] | None:
    """Every tensor of the directory's safetensors files; None when it holds no weights at all.

    Raises ToolchainError (TC-015 cut off, TC-016 damaged, TC-017 index and shards disagree) and UsageError
    TC-018 when the only weights are pickles.
    """
    index = directory / INDEX
    if index.is_file():
        return _indexed(directory, weight_map_of(read_json(index), str(index)))
    shards = sorted(directory.glob("*.safetensors"))
    if shards:
        return _unique([read_shard(shard) for shard in shards], directory)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise UsageError(
            f"{directory} holds only pickles ({', '.join(pickles[:3])}), and loading one runs code",
            hint="convert it to safetensors, or choose a repository or revision that has safetensors files",
            code="TC-018",
        )
    return None


def has_all_shards(directory: Path) -> bool:
    """True when the weights are there by name: every file of the index, or some safetensors file without one."""
    index = directory / INDEX
    if index.is_file():
        files = set(weight_map_of(read_json(index), str(index)).values())
        return all((directory / file).is_file() for file in files)
    return any(directory.glob("*.safetensors"))


def weight_map_of(index: Any, where: str) -> dict[str, str]:
    """``weight_map`` of an index: tensor name -> file name in the same directory."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _inconsistent(f"{where} has no weight_map")
    for file in weight_map.values():
        # A name such as ../x would make us read outside of the model directory.
        if not isinstance(file, str) or Path(file).name != file:
            raise _inconsistent(f"{where} names {file!r}, expected a file name without a directory")
    return weight_map


def _indexed(directory: Path, weight_map: dict[str, str]) -> list[TensorInfo]:
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (directory / file).is_file()]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise _inconsistent(
            f"{len(absent)} of {len(files)} shards are missing: {', '.join(absent[:3])}{more}"
        )
    tensors = _unique([read_shard(directory / file) for file in files], directory)
    check_index(weight_map, tensors)
    return tensors


def check_index(weight_map: dict[str, str], tensors: list[TensorInfo]) -> None:
    """ToolchainError TC-017 unless the index and the shards' headers say the same."""
    found = {tensor.name: tensor.file for tensor in tensors}
    wrong = [name for name, file in weight_map.items() if found.get(name) != file]
    extra = [name for name in found if name not in weight_map]
    if wrong:
        name = wrong[0]
        where = f"it is in {found[name]}" if name in found else "no shard has it"
        raise _inconsistent(
            f"{len(wrong)} tensors are not where {INDEX} says: {name} in {weight_map[name]}, {where}"
        )
    if extra:
        raise _inconsistent(f"{len(extra)} tensors in the shards are not in {INDEX}: {extra[0]}")


def _unique(shards: list[list[TensorInfo]], directory: Path) -> list[TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for tensor in (tensor for shard in shards for tensor in shard):
        if tensor.name in tensors:
            raise _inconsistent(
                f"{directory}: {tensor.name} is in {tensors[tensor.name].file} and in {tensor.file}"
            )
        tensors[tensor.name] = tensor
    return list(tensors.values())


def _inconsistent(what: str) -> ToolchainError:
    return ToolchainError(
        what, hint="the download is incomplete or mixed: fetch the model again", code="TC-017"
    )
