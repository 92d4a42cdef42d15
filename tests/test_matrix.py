"""The matrix of formats, families and KV caches: what docs/matrix.json and the README say is what happens.

A few cells are run always; `make test-matrix` runs all of them and writes docs/matrix.json again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.matrix import (
    MODELS,
    Cell,
    cells,
    describe,
    make_source,
    plan_cell,
    read_record,
    record,
    refusals,
    run_cell,
)

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(model: str) -> Path:
        if model not in made:
            made[model] = make_source(model, tiny, tmp_path_factory.mktemp("source"))
        return made[model]

    return get


@pytest.mark.parametrize("model", MODELS)
def test_the_record_is_what_plans_say(source: Callable[[str], Path], model: str) -> None:
    """Every cell is there; those that are refused are refused now, with the same words, and no others."""
    found = read_record()
    about = describe(source(model))
    assert found["models"][model] == about
    rows = {
        Cell(**{key: row[key] for key in ("model", "format", "policy", "kv_cache")}): row["refused"]
        for row in found["cells"]
        if row["model"] == model
    }
    assert rows == {
        cell: refusals(plan_cell(cell, source(model))) for cell in cells(model, is_moe=about["moe"])
    }


@pytest.mark.parametrize("format_name", ["int8_sq", "w4a8_awq", "w4a8_nvfp4_fp8"])
@pytest.mark.parametrize("model", ["glm4_moe", "minimax"])
def test_a_few_cells_run(source: Callable[[str], Path], tmp_path: Path, model: str, format_name: str) -> None:
    """Those that no other test has."""
    cell = Cell(model=model, format=format_name, policy="all-linear")
    assert run_cell(cell, source(model), tmp_path / "out")["refused"] == []


@pytest.mark.matrix
@pytest.mark.parametrize("model", MODELS)
def test_every_cell_runs_or_is_refused_by_its_plan(
    source: Callable[[str], Path], tmp_path: Path, model: str
) -> None:
    about, results, failures = describe(source(model)), [], []
    for index, cell in enumerate(cells(model, is_moe=about["moe"])):
        try:
            results.append(run_cell(cell, source(model), tmp_path / str(index)))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a failed cell; the others go on
            failures.append(f"{cell}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)
    if os.environ.get("WRITE_GOLDENS"):
        record(model, about, results)
