"""Memory beside speed: what quantization is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolchain.bench.compare.sides import Side
from toolchain.bench.types import BenchResult

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    name: str
    a_bytes: float | None
    b_bytes: float | None

    @property
    def ratio(self) -> float | None:
        return self.b_bytes / self.a_bytes if self.a_bytes and self.b_bytes is not None else None


def memory_rows(a: Side, b: Side) -> tuple[MemoryRow, ...]:
    """What at least one side knows."""
    pairs = zip(_memory(a.first), _memory(b.first), strict=True)
    rows = [MemoryRow(name=name, a_bytes=one, b_bytes=other) for (name, one), (_, other) in pairs]
    return tuple(row for row in rows if row.a_bytes is not None or row.b_bytes is not None)


def _memory(result: BenchResult) -> Iterator[tuple[str, float | None]]:
    engine: dict[str, Any] = result.environment.get("engine") or {}
    memory: dict[str, Any] = result.environment.get("memory") or {}
    peaks = [level.gpu.memory_peak_gib * GIB for level in result.levels if level.gpu is not None]
    yield "checkpoint", engine.get("checkpoint_bytes")
    yield "KV cache per token", engine.get("kv_bytes_per_token")
    yield "processes, peak", memory.get("process_peak_bytes")
    yield "GPU, peak", max(peaks) if peaks else None
