"""Hidden states in front of a layer, in a file: they survive a kill, and the page cache holds them while there is room.

One file per layer; the layer reads one and writes the next. The bytes are those of the tensors, batch after batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolchain.checkpoint.shard_file import disk_error
from toolchain.core.errors import ToolchainError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What one such file holds."""

    shapes: tuple[tuple[int, ...], ...]
    """[B, T, H] of every batch."""
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return sum(map(prod, self.shapes)) * self.dtype.itemsize


class StoredHidden:
    """A ``Hidden`` (``accuracy/layers.py``) in files: ``path`` is read, ``advance`` writes ``following``."""

    def __init__(self, path: Path, following: Path, layout: Layout, device: torch.device) -> None:
        self.path, self.following, self.layout, self.device = path, following, layout, device

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._read(self.path)

    def advance(self, step: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Write what ``step`` makes of each batch. Whoever reads on must use another object."""
        write(self.following, (step(batch) for batch in self))

    def _read(self, path: Path) -> Iterator[torch.Tensor]:
        with path.open("rb") as file:
            for shape in self.layout.shapes:
                data = np.empty(prod(shape) * self.layout.dtype.itemsize, dtype=np.uint8)
                if file.readinto(data.data) != data.nbytes:
                    raise ToolchainError(
                        f"{path} is shorter than it was",
                        hint=f"remove {path.parent.parent} to begin anew",
                        code="TC-233",
                    )
                yield torch.from_numpy(data).view(self.layout.dtype).reshape(shape).to(self.device)


def write(path: Path, batches: Iterable[torch.Tensor]) -> None:
    """Write all ``batches``, on the disk when this returns; ``path`` appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for batch in batches:
                data: Any = batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(data.data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(path, error) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def digest(path: Path) -> str:
    """SHA-256 of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
