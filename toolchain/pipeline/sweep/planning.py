"""All cells planned before any of them runs: what cannot be done is known before the first GPU hour is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from toolchain.core.errors import FindingsError, ToolchainError, UsageError
from toolchain.core.files import sha256_json
from toolchain.core.findings import Finding, errors
from toolchain.core.progress import Progress
from toolchain.models.types import ModelInfo
from toolchain.pipeline.inputs import CALIBRATION_FILE, EVALUATION_FILE
from toolchain.pipeline.judging import held_out_text, require_judgeable
from toolchain.pipeline.planning import make_request_plan
from toolchain.pipeline.request import EngineRequest
from toolchain.pipeline.sweep.cells import PLACEMENT, Cell
from toolchain.plan.planner import require_clean
from toolchain.plan.types import Plan

NO_WEIGHTS = "TC-144"
"""A finding that is a warning to a plan, and the end of a sweep's cell."""
SPELLINGS = ("model", "format", "recipe", "policy")
"""Keys of a request that the plan resolves: None, ``default`` and ``max`` may be one recipe."""


class SweepRefused(FindingsError):
    """Cells cannot be planned: nothing was run. Exit status 2."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    cell: Cell
    plan: Plan | None = None
    error: ToolchainError | None = None
    """Why there is no plan that can be carried out."""
    twin: str | None = None
    """An earlier cell with the same plan, which is not run twice."""


def plan_cells(cells: Sequence[Cell], *, measured: bool, progress: Progress) -> list[PlannedCell]:
    """One per cell, in their order. Headers of a model are read once, and no weight. ``measured``: there must be text
    to judge on."""
    models: dict[tuple[str, bool], ModelInfo] = {}
    found: list[PlannedCell] = []
    first: dict[str, str] = {}
    for cell in progress.track(cells, description="plan", total=len(cells)):
        planned = _planned(cell, models, measured)
        if planned.plan is not None and cell.request is not None and not cell.request.is_auto:
            key = sha256_json([planned.plan.to_json(), _rest(cell.request)])
            planned = replace(planned, twin=first.get(key))
            first.setdefault(key, cell.name)
        found.append(planned)
    return found


def refuse(planned: Sequence[PlannedCell]) -> None:
    """SweepRefused TC-180 when a cell has no plan."""
    findings = [_finding(item) for item in planned if item.error is not None]
    if findings:
        raise SweepRefused(
            f"{len(findings)} of {len(planned)} cells cannot be planned, nothing was run",
            findings,
            hint="correct or exclude them, or go on without them: --skip-refused",
            code="TC-180",
        )


def reason(error: ToolchainError) -> str:
    """In one line: the first finding where there are several."""
    found = errors(getattr(error, "findings", ()))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0].where}: {found[0].message}{more}" if found else error.message


def code_of(error: ToolchainError) -> str:
    found = errors(getattr(error, "findings", ()))
    return found[0].code if found else error.code


def _finding(item: PlannedCell) -> Finding:
    error = item.error or ToolchainError("")
    found = errors(getattr(error, "findings", ()))
    hint = found[0].hint if found else error.hint
    return Finding(code=code_of(error), where=item.cell.name, message=reason(error), hint=hint)


def _planned(cell: Cell, models: dict[tuple[str, bool], ModelInfo], measured: bool) -> PlannedCell:
    if cell.request is None:
        return PlannedCell(cell=cell, error=cell.error)
    try:
        info = _model(cell.request, models)
        plan = require_clean(make_request_plan(cell.request, info))
        _require_weights(info, plan)
        _require_calibration(plan)
        if measured:
            _require_held_out(cell.request, plan)
    except ToolchainError as error:
        return PlannedCell(cell=cell, error=error)
    return PlannedCell(cell=cell, plan=plan)


def _model(request: EngineRequest, models: dict[tuple[str, bool], ModelInfo]) -> ModelInfo:
    from toolchain.models.reader import read_model

    key = (request.model, request.trust_remote_code)
    if key not in models:
        models[key] = read_model(request.model, trust_remote_code=request.trust_remote_code)
    return models[key]


def _require_weights(info: ModelInfo, plan: Plan) -> None:
    if not info.has_weights:
        said = next(finding for finding in plan.findings if finding.code == NO_WEIGHTS)
        raise ToolchainError(said.message, hint=said.hint, code=NO_WEIGHTS)


def _require_calibration(plan: Plan) -> None:
    """Local texts can be read; data sets on the hub show themselves in the cell."""
    from toolchain.data.sources import read_source
    from toolchain.quantize.quantizers import needs_data

    if not needs_data(plan):
        return
    source = Path(plan.model)
    if source.is_dir() and not plan.calibration.sources and not (source / CALIBRATION_FILE).is_file():
        raise UsageError(
            f"{plan.format} with recipe {plan.recipe} is calibrated, and there is no text for it",
            hint=f"give calib_data, or put {CALIBRATION_FILE} into the model's directory",
            code="TC-204",
        )
    for text in plan.calibration.sources:
        if Path(text).exists() or text.startswith((".", "/", "~")):
            next(iter(read_source(text)), None)


def _require_held_out(request: EngineRequest, plan: Plan) -> None:
    source = Path(plan.model)
    if held_out_text(request, source) is None:
        raise UsageError(
            "there is no held-out text to compare on",
            hint=f"give eval_data, put {EVALUATION_FILE} into the model's directory, or say --until quantize",
            code="TC-520",
        )
    require_judgeable(request, plan, source)


def _rest(request: EngineRequest) -> dict[str, object]:
    """What a request says beside its plan."""
    return {key: value for key, value in asdict(request).items() if key not in (*SPELLINGS, *PLACEMENT)}
