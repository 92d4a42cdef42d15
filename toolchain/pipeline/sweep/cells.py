"""The cells of a sweep: one engine request each, with a name that says how it differs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import sha256_json
from toolchain.pipeline.request import EngineRequest
from toolchain.pipeline.sweep.spec import Sweep, Values
from toolchain.plan.policy import PolicyOptions

NAMED = {
    "model",
    "format",
    "bits",
    "auto_formats",
    "auto_method",
    "auto_cost",
    "kv_cache",
    "policy",
    "recipe",
    "target",
    *(item.name for item in fields(PolicyOptions)),
}
"""Keys that ``EngineRequest.engine_name`` says where they are not the default."""
PLACEMENT = {"stream", "executor", "ray_address", "ray_cpus"}
"""Keys that decide where and how the work is done, but not what is written."""
LONGEST_NAME = 120
"""Characters: file systems take 255, and names are read by people."""
_DEFAULTS = {item.name: item.default for item in fields(EngineRequest) if item.default is not MISSING}


@dataclass(frozen=True, kw_only=True)
class Cell:
    number: int
    """From 1, in the order of the SPEC."""
    name: str
    values: Values
    request: EngineRequest | None
    """None where the values make none."""
    error: ToolchainError | None = None
    """Why there is no request."""

    @property
    def identity(self) -> Values:
        """What decides the result, as JSON: a record of other values is of another cell of this name."""
        found = self.values if self.request is None else asdict(self.request)
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in found.items()
            if key not in PLACEMENT
        }


def cells_of(sweep: Sweep) -> list[Cell]:
    """All cells, in the order of the axes, then ``include``. UsageError TC-181 for cells that cannot be told apart,
    TC-184 for an exclude that leaves nothing out and for a sweep without cells."""
    found = [
        _cell(sweep, number, values)
        for number, values in enumerate([*_grid(sweep), *_included(sweep)], start=1)
    ]
    if not found:
        raise UsageError("exclude leaves no cell over", hint="take something out of it", code="TC-184")
    by_name: dict[str, list[Cell]] = {}
    for cell in found:
        by_name.setdefault(cell.name, []).append(cell)
    same = [f"{name}: {_differing(cells)}" for name, cells in by_name.items() if len(cells) > 1]
    if same:
        raise UsageError(
            f"cells that have one name: {'; '.join(same)}",
            hint="name models of equal directory names (models: {first: DIR, second: DIR}), or take doubles out",
            code="TC-181",
        )
    return found


def pick_cells(cells: list[Cell], names: tuple[str, ...], number: int | None) -> list[Cell]:
    """The cells of these names and of this number; all of them where nothing is asked for. UsageError TC-182."""
    known = {cell.name: cell for cell in cells}
    unknown = [name for name in names if name not in known]
    if unknown or (number is not None and not 1 <= number <= len(cells)):
        asked = ", ".join(unknown) or f"number {number}"
        raise UsageError(
            f"no cell {asked} in this sweep of {len(cells)}",
            hint=f"`toolchain sweep SPEC --dry-run` lists them; the first is {cells[0].name}",
            code="TC-182",
        )
    if not names and number is None:
        return cells
    return [cell for cell in cells if cell.name in names or cell.number == number]


def _grid(sweep: Sweep) -> Iterator[Values]:
    hit = [False] * len(sweep.exclude)
    for combination in itertools.product(*sweep.axes.values()) if sweep.axes else ():
        values = {**sweep.base, **dict(zip(sweep.axes, combination, strict=True))}
        left_out = False
        for index, entry in enumerate(sweep.exclude):
            if all(values.get(key, _DEFAULTS.get(key)) in wanted for key, wanted in entry.items()):
                hit[index] = left_out = True
        if not left_out:
            yield values
    if not all(hit):
        entry = sweep.exclude[hit.index(False)]
        raise UsageError(
            f"exclude {entry} leaves out no cell of the grid",
            hint="it names values that no axis has: correct it, or take it out",
            code="TC-184",
        )


def _included(sweep: Sweep) -> Iterator[Values]:
    for entry in sweep.include:
        yield {**sweep.base, **entry}


def _cell(sweep: Sweep, number: int, values: Values) -> Cell:
    try:
        request = EngineRequest(**values)
        name = _name(sweep, request)
    except ToolchainError as error:
        parts = [values.get(key) for key in ("model", "format", "recipe", "kv_cache")]
        name = _slug("-".join(str(part) for part in parts if part))
        return Cell(number=number, name=name, values=values, request=None, error=error)
    return Cell(number=number, name=name, values=values, request=request)


def _name(sweep: Sweep, request: EngineRequest) -> str:
    """What the engine would be called, and each further value that is not that of ``base``: so an axis that is added
    later, with the old value among its own, leaves the names of finished cells as they are."""
    named = NAMED | ({"gpu"} if request.target != "local" else set())
    name = request.engine_name(sweep.labels.get(request.model, ""))
    for key, value in asdict(request).items():
        usual = sweep.base.get(key, _DEFAULTS.get(key))
        if key not in named | PLACEMENT and value != usual:
            name += f"-{key}_{_short(value)}"
    name = _slug(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{sha256_json(name)[:8]}"


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(_short(item) for item in value)
    text = str(value)
    return Path(text).stem if "/" in text else text


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.").lower()


def _differing(cells: list[Cell]) -> str:
    """The keys in which cells of one name differ."""
    first = cells[0].values
    keys = [key for key in first if any(cell.values.get(key) != first[key] for cell in cells)]
    if not keys:
        return "the same cell twice"
    return " and ".join(f"{keys[0]} {cell.values.get(keys[0])!r}" for cell in cells)
