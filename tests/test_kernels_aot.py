"""Every kernel compiles for every GPU that is named, without one: by triton's own compiler and assembler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from toolchain.core.gpus import GPUS
from toolchain.kernels.aot import ARCHITECTURES, SHARED_BYTES

OWN_MEMORY = (90, 100, 103)
"""Whose tensor cores keep sums, or take inputs, outside the registers."""


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
        native = {100, 103, 120}  # triton 3.7 compiles no product of scaled blocks for 121
        own = {"e4m3": {80}, "e4m3x": set(ARCHITECTURES) - {80}, "e2m1x": native}
        code = name.split()[1] if len(name.split()) > 2 else ""
        assert seen == own.get(code, set(ARCHITECTURES)), name
    assert len(by_name) >= 64
    assert {gpu.sm for gpu in GPUS} - {0} == set(ARCHITECTURES)


def test_what_they_use_is_there(compiled: list[dict[str, Any]]) -> None:
    """Registers are a number of the machine's; shared memory fits; little is spilled."""
    for found in compiled:
        assert 0 < found["registers"] <= 255, found
        assert found["shared_bytes"] <= SHARED_BYTES[found["sm"]], found
        # Without wgmma and tensor memory decoded weights, inputs and sums are all in registers.
        assert found["spilled_bytes"] <= (128 if found["sm"] in OWN_MEMORY else 512), found


def test_products_run_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    own = {90: "wgmma", 100: "tcgen05", 103: "tcgen05"}
    for found in compiled:
        if found["name"].split()[-1].count("x") == 2:  # ends in the sizes of a block
            assert found["instructions"] == own.get(found["sm"], "mma"), found
