"""Every kernel compiles for every GPU that is named, without one: by triton's own compiler and assembler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from toolchain.kernels.aot import ARCHITECTURES, SHARED_BYTES


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """In a process of its own: here the kernels are the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "toolchain.kernels.aot", "--json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_for_every_architecture(compiled: list[dict[str, Any]]) -> None:
    by_name: dict[str, set[int]] = {}
    for found in compiled:
        by_name.setdefault(found["name"], set()).add(found["sm"])
    for name, seen in by_name.items():
        older = {80} if " e4m3 " in name else set()
        newer = {90, 100, 120} if " e4m3x " in name else {100, 120} if " e2m1x " in name else set()
        assert seen == (older or newer or set(ARCHITECTURES)), name
    assert len(by_name) >= 28


def test_what_they_use_is_there(compiled: list[dict[str, Any]]) -> None:
    """Registers are a number of the machine's; shared memory fits; little is spilled."""
    for found in compiled:
        assert 0 < found["registers"] <= 255, found
        assert found["shared_bytes"] <= SHARED_BYTES[found["sm"]], found
        # Without wgmma and tensor memory decoded weights, inputs and sums are all in registers.
        assert found["spilled_bytes"] <= (512 if found["sm"] in (80, 120) else 128), found


def test_products_run_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    own = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
    for found in compiled:
        if "gate_up" in found["name"] or " down " in found["name"]:
            assert found["instructions"] == own[found["sm"]], found
