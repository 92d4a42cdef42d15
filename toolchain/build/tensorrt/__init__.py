"""Target ``tensorrt``: rank files, trtllm-build and the engine that it makes."""

from __future__ import annotations

from toolchain.build.tensorrt.bundle import FILES, remove_tensorrt_files, write_tensorrt_files
from toolchain.build.tensorrt.checkpoint import write_legacy_checkpoint
from toolchain.build.tensorrt.lock import read_lock, require_built
from toolchain.build.tensorrt.mapping import Parallel

__all__ = [
    "FILES",
    "Parallel",
    "read_lock",
    "remove_tensorrt_files",
    "require_built",
    "write_legacy_checkpoint",
    "write_tensorrt_files",
]
