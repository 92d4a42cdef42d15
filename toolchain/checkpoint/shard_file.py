"""A safetensors file whose tensors are known before their numbers: filled by position, in any order, by any thread.

``safetensors.torch.save_file`` needs every tensor of the file in memory at once. The bytes here are the same: tensors
by dtype, then by name, and the header padded to 8 bytes (safetensors 0.5 to 0.7; a test compares whole files).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.core.errors import ToolchainError
from toolchain.formats.base import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

DTYPE_ORDER = (
    "I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
"""In the library's order: wide ones first, so that all stay aligned."""
METADATA = {"format": "pt"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor that is going to be written."""

    name: str
    dtype: str
    """Safetensors dtype name."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class ShardFile:
    """An open file of the size that it will have. ``put`` may be called from several threads."""

    def __init__(self, path: Path, specs: Iterable[TensorSpec], *, reopen: bool = False) -> None:
        """``reopen``: go on with the file that is there, made from the same ``specs``.

        ToolchainError TC-005 when the disk is too full to hold it; ValueError for a file of another size.
        """
        self.path = path
        ordered = sorted(specs, key=lambda spec: (DTYPE_ORDER.index(spec.dtype), spec.name))
        self.specs = {spec.name: spec for spec in ordered}
        header, self._starts, self.size = _header(ordered)
        if reopen and path.stat().st_size != self.size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, these tensors take {self.size}")
        begin = 0 if reopen else os.O_CREAT | os.O_TRUNC
        self._descriptor = os.open(path, os.O_RDWR | begin, 0o644)
        try:
            if self.size:
                os.posix_fallocate(self._descriptor, 0, self.size)
            _write(self._descriptor, header, 0)
        except OSError as error:
            os.close(self._descriptor)
            if not reopen:
                path.unlink(missing_ok=True)
            raise disk_error(path, error) from error

    def put(self, name: str, tensor: torch.Tensor, *, at: int = 0) -> None:
        """Write ``tensor`` as the elements of ``name`` from index ``at`` of its first dimension."""
        import torch

        spec = self.specs[name]
        row = prod(spec.shape[1:]) * DTYPE_BYTES[spec.dtype] if spec.shape else 0
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if at * row + data.nbytes > spec.bytes:
            raise ValueError(f"{name}: {data.nbytes} bytes at row {at} do not fit into {spec}")
        try:
            _write(self._descriptor, memoryview(data), self._starts[name] + at * row)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def put_bytes(self, name: str, data: Any, *, offset: int) -> None:
        """Write ``data`` (a buffer) at byte ``offset`` of ``name``."""
        try:
            _write(self._descriptor, memoryview(data), self._starts[name] + offset)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def read(self, name: str, *, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
        """The bytes of ``name`` as they stand in the file, in order."""
        start, left = self._starts[name], self.specs[name].bytes
        while left:
            part = os.pread(self._descriptor, min(chunk_bytes, left), start)
            if not part:
                return
            yield part
            start, left = start + len(part), left - len(part)

    def flush(self) -> None:
        """To the disk; the file stays open."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def close(self) -> None:
        """Flush to the disk: afterwards the bytes survive a loss of power."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise disk_error(self.path, error) from error
        finally:
            os.close(self._descriptor)

    def abandon(self) -> None:
        os.close(self._descriptor)


def disk_error(path: Path, error: OSError) -> ToolchainError:
    """What a user needs when writing fails: the disk is full, or its errno in words."""
    return ToolchainError(
        f"{path} cannot be written: {error.strerror or error}",
        hint="make room on that disk and run the same command again: what is finished is kept",
        code="TC-005",
    )


def _header(ordered: list[TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """(bytes up to the data, name -> offset in the file, size of the file)."""
    entries: dict[str, Any] = {"__metadata__": METADATA}
    position, relative = 0, {}
    for spec in ordered:
        end = position + spec.bytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        relative[spec.name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    starts = {name: begin + offset for name, offset in relative.items()}
    return len(text).to_bytes(8, "little") + text, starts, begin + position


def _write(descriptor: int, data: Any, position: int) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written
