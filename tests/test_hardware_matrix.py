"""Dense layers and KV caches against the "Hardware Support Matrix" of TensorRT-LLM's documentation, by release.

``features/quantization`` on the branch gh-pages: 1.0.0 (090dc64), 1.1.0 (8660c11), 1.2.1 (58fb435) and 1.3.0rc29
(bf0ee2f).
Columns that no format here has (MXFP4 of dense layers, W4A8 GPTQ) are left out.
"""

from __future__ import annotations

import pytest

from toolchain.targets import TRTLLM

COLUMNS = (
    *("nvfp4", "fp8", "fp8_block", "fp8_per_channel_per_token", "kv fp8", "kv nvfp4"),
    *("w4a8_awq", "int4_awq", "int4_gptq"),
)
SMS = {"sm120": (120,), "sm100": (100,), "sm103": (103,), "Hopper": (90,), "Ada": (89,), "Ampere": (80,)}
OLD = """
sm120   Y Y . . Y . . . .
sm100   Y Y Y . Y . . . .
Hopper  . Y Y Y Y . Y Y Y
Ada     . Y . . Y . Y Y Y
Ampere  . . . . Y . . Y Y
"""
WITH_SM103 = OLD + "sm103   Y Y Y . Y . . . .\n"
NEW = """
sm120   Y Y . . Y . . . .
sm100   Y Y Y . Y Y Y Y Y
sm103   Y Y Y . Y Y Y Y Y
Hopper  . Y Y Y Y . Y Y Y
Ada     . Y . . Y . Y Y Y
Ampere  . . . . Y . . Y Y
"""
MATRICES = {"1.0.0": OLD, "1.1.0": WITH_SM103, "1.2.0": NEW, "1.2.1": NEW, "1.3.0rc29": NEW, "1.4.0rc1": NEW}
"""1.2.0's page was not read: it is of the same branch. 1.4 has none that could be read: what 1.3 has should stay."""


def runs(version: str, sm: int, column: str) -> bool:
    if column.startswith("kv "):
        return TRTLLM.find_kv(kv_cache=column[3:], sm=sm, model="dense", version=version) is not None
    row = TRTLLM.find(format_name=column, sm=sm, model="dense", version=version)
    # Marlin runs NVFP4 weights as W4A16 on older GPUs: release notes of 1.3.0rc20, not the matrix.
    return row is not None and row.backend != "MARLIN"


@pytest.mark.parametrize("version", MATRICES)
def test_dense_layers_and_kv_caches(version: str) -> None:
    for line in MATRICES[version].strip().splitlines():
        name, *cells = line.split()
        for column, cell in zip(COLUMNS, cells, strict=True):
            for sm in SMS[name]:
                assert runs(version, sm, column) == (cell == "Y"), (version, name, column)


def test_b300_is_not_in_the_matrix_of_1_0() -> None:
    assert not any(runs("1.0.0", 103, column) for column in COLUMNS if column != "kv fp8")


def test_mxfp8_recipe_of_fp8_blocks_is_said() -> None:
    """The note under every matrix: UE8M0 scales on SM100 and SM103, FP32 scales on SM90."""
    for sm, state in ((90, "yes"), (100, "limited"), (103, "limited")):
        row = TRTLLM.find(format_name="fp8_block", sm=sm, model="dense", version="1.2.1")
        assert row is not None
        assert row.state == state
