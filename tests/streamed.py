"""What tests of streamed checkpoints share."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.checkpoint import writer
from toolchain.quantize.streaming import outline

SHARD_BYTES = 60_000
"""Small: q, k and v, gate and up lie in different shards."""


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of quantizing write shards of ``SHARD_BYTES``."""
    monkeypatch.setattr(writer.write_shards, "__kwdefaults__", {"shard_bytes": SHARD_BYTES})
    defaults = {**outline.make_outline.__kwdefaults__, "shard_bytes": SHARD_BYTES}
    monkeypatch.setattr(outline.make_outline, "__kwdefaults__", defaults)


def files(directory: Path) -> dict[str, bytes]:
    """All but the manifest, which tells times and memory."""
    return {
        path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "quantize.json"
    }


def hidden(directory: Path) -> list[str]:
    """Names of what is left over."""
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))
