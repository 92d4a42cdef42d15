"""Tensors are held where there is room; whether they are changes nothing but how often they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.planning import plan_for
from toolchain.plan.types import Plan
from toolchain.quantize.job import quantize
from toolchain.quantize.streaming.buffers import Buffers, Held
from toolchain.quantize.streaming.rows import Rows

Tiny = Callable[[str], Path]


def made(plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, bytes], int]:
    """Shards of a streamed run, and how many bytes of the source it read."""
    read, into = 0, Rows.read_into

    def counting(self: Rows, name: str, offset: int, data: Any) -> None:
        nonlocal read
        read += len(data)
        into(self, name, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "read_into", counting)
        quantize(plan, output, device="cpu", stream=True)
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}, read


@pytest.mark.parametrize("limit", [{"largest": 0}, {"budget": 40_000}])
def test_with_room_for_nothing_or_little(
    limit: dict[str, int], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny("qwen3_moe"), "w4a16_nvfp4", policy="all-linear")
    held, read_held = made(plan, tmp_path / "held", monkeypatch)
    size = sum(path.stat().st_size for path in tiny("qwen3_moe").glob("*.safetensors"))
    assert size * 0.95 < read_held <= size, "each tensor is read once"
    monkeypatch.setattr(Held.__init__, "__kwdefaults__", {"budget": 1 << 30, "largest": 1 << 30, **limit})
    again, read_again = made(plan, tmp_path / "again", monkeypatch)
    assert again == held and read_again > read_held


def test_a_budget_is_kept_and_given_back() -> None:
    held = Held(Buffers(), budget=100, largest=60)
    assert held.reserve("large", 61) is None
    first = held.reserve("first", 60)
    assert first.nbytes == 60 and held.reserve("second", 41) is None
    held.keep("first", first)
    assert held.get("first") is first and held.reserve("first", 10) is None
    held.release("first")
    held.release("first")
    assert held.get("first") is None and held.reserve("second", 41).nbytes == 41


def test_buffers_are_used_again() -> None:
    buffers = Buffers()
    with buffers.lent(1000) as first:
        assert not np.shares_memory(first, buffers.take(1000))
    assert buffers.take(1000) is first
    assert buffers.take(1000) is not first
