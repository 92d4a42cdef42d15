"""Safetensors headers, read and validated without touching a weight. Standard library only.

Layout of a file (safetensors format description): 8 bytes little-endian header length, that many bytes of
JSON, then the data. The JSON maps tensor names to ``dtype``, ``shape`` and ``data_offsets`` relative to the
start of the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.formats.base import DTYPE_BYTES
from toolchain.models.types import TensorInfo

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""


def read_shard(path: Path) -> list[TensorInfo]:
    """Tensors of one file, by offset.

    ToolchainError TC-015 when it is cut off, TC-016 when the header is damaged.
    """
    size = path.stat().st_size
    header, header_bytes = _read_header(path, size)
    tensors = tensors_of_header(header, file=path.name)
    promised = 8 + header_bytes + _data_bytes(header, path.name)
    if size < promised:
        raise ToolchainError(
            f"{path} is cut off: its header promises {promised} bytes, the file has {size} "
            f"({promised - size} are missing)",
            hint="fetch this shard again",
            code="TC-015",
        )
    if size > promised:
        raise _damaged(path.name, f"{size - promised} bytes follow the last tensor")
    return tensors


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise ToolchainError(
                f"{path} is cut off: {size} bytes, too short for a safetensors file",
                hint="fetch this shard again",
                code="TC-015",
            )
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise _damaged(
                path.name,
                f"a header of {length} bytes (at most {MAX_HEADER_BYTES} expected): no safetensors file",
            )
        raw = handle.read(length)
    if len(raw) < length:
        raise ToolchainError(
            f"{path} is cut off: its header should have {length} bytes, {len(raw)} are there",
            hint="fetch this shard again",
            code="TC-015",
        )
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _damaged(path.name, f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path.name, f"the header is a JSON {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    return header, length


def tensors_of_header(header: Mapping[str, Any], *, file: str) -> list[TensorInfo]:
    """TensorInfo of each header entry, in order of offset; ToolchainError TC-016 on the first entry that is
    off.

    Checked: dtype is known, shape and offsets are non-negative integers, each tensor has the bytes that its
    shape needs, and together they cover the data without overlap or hole.
    """
    tensors: list[tuple[int, int, TensorInfo]] = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(file, f"entry {name!r} lacks dtype, shape or two data_offsets") from error
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise _damaged(file, f"entry {name!r} has shape {list(shape)} and offsets {[begin, end]}")
        if dtype not in DTYPE_BYTES:
            raise _damaged(
                file, f"entry {name!r} has dtype {dtype!r}, known: {', '.join(sorted(DTYPE_BYTES))}"
            )
        if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
            raise _damaged(
                file,
                f"{name!r} ({dtype} {list(shape)}) needs {prod(shape) * DTYPE_BYTES[dtype]} bytes, "
                f"its offsets {[begin, end]} span {end - begin}",
            )
        tensors.append((begin, end, TensorInfo(name=name, shape=shape, dtype=dtype, file=file)))
    tensors.sort(key=lambda item: item[:2])
    position = 0
    for begin, end, tensor in tensors:
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise _damaged(file, f"{tensor.name!r} starts at {begin}, expected {position}: it {what}")
        position = end
    return [tensor for _, _, tensor in tensors]


def _data_bytes(header: Mapping[str, Any], file: str) -> int:
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)


def _damaged(file: str, what: str) -> ToolchainError:
    return ToolchainError(
        f"{file}: damaged safetensors header: {what}", hint="fetch this shard again", code="TC-016"
    )
