"""Read a few rows of a source tensor at a time, by position and not through a memory map.

Pages of a memory map count as the process's own memory until the kernel takes them back: a checkpoint of 600 GB would
fill any machine. What was read is dropped from the page cache too, unless it is read again.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import torch

from toolchain.checkpoint.raw import Place, places
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.checkpoint.source import QuantizedSource
from toolchain.codecs import compiled, get_codec
from toolchain.core.errors import ToolchainError
from toolchain.models.prequantized import FP8, MXFP4, keeps_values
from toolchain.models.types import TensorInfo
from toolchain.quantize.streaming.buffers import Buffers, Held

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class Rows:
    """Parts of the tensors of one source directory. May be used from several threads."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader
        self._stored = reader.stored
        self._places = places(reader.directory, self._stored.values())
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self.buffers = Buffers()
        self._held = Held(self.buffers)
        self.read_bytes = 0
        """From the files so far, whether the disk or the page cache had them."""

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def is_quantized(self, name: str) -> bool:
        return isinstance(self.reader, QuantizedSource) and name in self.reader.quantized

    def pair(self, name: str) -> tuple[TensorInfo, TensorInfo]:
        """Stored codes and scales of a quantized tensor."""
        assert isinstance(self.reader, QuantizedSource)
        return self.reader.pair(name)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The tensors in the files that ``name`` is made of."""
        return tuple(info.name for info in self.pair(name)) if self.is_quantized(name) else (name,)

    def casts(self, name: str, format_name: str) -> bool:
        """True where MXFP4 numbers of the source become numbers of an NVFP4 format exactly."""
        return (
            isinstance(self.reader, QuantizedSource)
            and name in self.reader.quantized
            and self.reader.scheme.method == MXFP4
            and keeps_values(self.reader.scheme, format_name)
        )

    def row_multiple(self, name: str) -> int:
        """Rows that share a scale in the source: parts of ``read`` must begin at a multiple."""
        if isinstance(self.reader, QuantizedSource) and self.is_quantized(name):
            return self.reader.scheme.block[0] if self.reader.scheme.method == FP8 else 1
        return 1

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the first dimension of a tensor of ``reader.infos``, dequantized."""
        if not isinstance(self.reader, QuantizedSource) or name not in self.reader.quantized:
            return self.stored(name, start, stop)
        info, scale = self.reader.pair(name)
        codes = self.stored(info.name, start, stop)
        if self.reader.scheme.method != FP8:
            scales = self.stored(scale.name, start, stop)
            return _mxfp4(codes, scales)
        rows = self.reader.scheme.block[0]
        scales = self.stored(scale.name, start // rows, -(-stop // rows)).float()
        return compiled.dequantize_fp8(codes, scales, self.reader.scheme.block)

    def stored(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The same of a tensor as it stands in the files."""
        info = self._stored[name]
        row = info.bytes // info.shape[0] if info.shape and info.shape[0] else info.bytes
        data = self.bytes(name, start * row, (stop - start) * row if info.shape else info.bytes)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        return torch.from_numpy(data).view(TORCH_DTYPES[info.dtype]).reshape(shape)

    def bytes(self, name: str, offset: int, size: int) -> Any:
        """uint8 array of ``size`` bytes of the stored tensor ``name``. ToolchainError TC-015 when the file is short.

        Of a tensor that is held it is a view, good until ``release``.
        """
        held = self._held.get(name)
        if held is not None:
            return held[offset : offset + size]
        data = np.empty(size, dtype=np.uint8)
        self.read_into(name, offset, data)
        return data

    def read_into(self, name: str, offset: int, data: Any) -> None:
        """Fill the uint8 array ``data`` with bytes of ``name`` from ``offset``. ToolchainError TC-015."""
        place = self._places[name]
        view = memoryview(data.data)
        descriptor, position = self._open(place), place.start + offset
        while len(view):
            count = os.preadv(descriptor, [view], position)
            if count == 0:
                raise ToolchainError(
                    f"{self.reader.directory / place.file} became shorter while it was read",
                    hint="something else writes there; fetch the model again",
                    code="TC-015",
                )
            view, position = view[count:], position + count
        with self._lock:
            self.read_bytes += len(data)

    def hold(self, name: str) -> None:
        """Keep the stored tensor ``name`` in memory until ``release``, if there is room: it is read once then."""
        buffer = self._held.reserve(name, self._places[name].size)
        if buffer is not None:
            self.read_into(name, 0, buffer)
            self._held.keep(name, buffer)

    def release(self, name: str) -> None:
        """No part of ``name`` is referred to any more."""
        self._held.release(name)

    def info(self, name: str) -> TensorInfo:
        return self._stored[name]

    def announce(self, name: str) -> None:
        """Let the kernel fetch the stored tensor ahead of its use."""
        place = self._places[name]
        os.posix_fadvise(self._open(place), place.start, place.size, os.POSIX_FADV_WILLNEED)

    def forget(self, name: str) -> None:
        """Its pages are not needed any more: leave the page cache to what is."""
        place = self._places[name]
        os.posix_fadvise(self._open(place), place.start, place.size, os.POSIX_FADV_DONTNEED)

    def _open(self, place: Place) -> int:
        with self._lock:
            if place.file not in self._descriptors:
                self._descriptors[place.file] = os.open(self.reader.directory / place.file, os.O_RDONLY)
            return self._descriptors[place.file]


def _mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[E, out, in/32, 16] and [E, out, in/32] -> [E, in, out] bfloat16."""
    codec = get_codec("mxfp4")
    values = [
        codec.unpack({"weight": own.flatten(1), "weight_scale": scale}, torch.bfloat16).T
        for own, scale in zip(blocks, scales, strict=True)
    ]
    return torch.stack(values)
