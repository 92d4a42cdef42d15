"""The sweep: plan all cells, run those that are not finished, keep the table as it grows."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_text, require_free_bytes
from toolchain.core.progress import Progress
from toolchain.pipeline.engine import Until
from toolchain.pipeline.sweep.cells import Cell
from toolchain.pipeline.sweep.document import document
from toolchain.pipeline.sweep.executors import CellExecutor, Ended, Job
from toolchain.pipeline.sweep.place import Place
from toolchain.pipeline.sweep.planning import PlannedCell, code_of, plan_cells, reason, refuse
from toolchain.pipeline.sweep.table import as_csv, markdown
from toolchain.pipeline.sweep.work import LOCKED, failed, is_finished, refused, run_cell


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is asked of the cells."""

    place: Place
    until: Until
    force: bool
    progress: Progress

    def plan(self, cells: Sequence[Cell]) -> list[PlannedCell]:
        """Every refusal there is, before anything is written."""
        self.place.refuse_foreign()
        return plan_cells(cells, measured=self.until != "quantize", progress=self.progress)

    def is_done(self, planned: PlannedCell) -> bool:
        return not self.force and is_finished(planned, self.place, self.until)


def run_sweep(
    run: Run,
    cells: Sequence[Cell],
    chosen: Sequence[Cell],
    *,
    spec: str,
    command: Callable[[str], tuple[str, ...]],
    executor: CellExecutor,
    skip_refused: bool,
) -> dict[str, Any]:
    """Run the ``chosen`` of all ``cells`` that are not finished, and return the document (``sweep.json``).

    ``command``: name of a cell -> the process that runs it; ``spec``: text of the SPEC, kept beside the table. A cell
    that fails is recorded, and the rest goes on. SweepRefused TC-180 for cells that cannot be planned, unless
    ``skip_refused``; TC-005 when the disk cannot hold what is missing.
    """
    place = run.place
    planned = run.plan(chosen)
    if not skip_refused:
        refuse(planned)
    with place.exclusive():
        atomic_write_text(place.spec, spec)
        todo = _settle_without_work(run, planned)
        _require_space(place, todo)
        write_table(cells, place)
        jobs = [
            Job(name=name, command=command(name), log=place.log(name), directory=Path.cwd())
            for name in (item.cell.name for item in todo)
        ]
        by_name = {item.cell.name: item for item in todo}
        with closing(executor.run(jobs, run.progress)) as ended:
            for item in ended:
                run.progress.note(f"{item.name}: {_settle(run, by_name[item.name], item)}")
                write_table(cells, place)
    return write_table(cells, place)


def run_one(run: Run, cells: Sequence[Cell], cell: Cell, *, command: list[str]) -> dict[str, Any]:
    """Run one cell in this process, unless it is finished; returns the document. What fails is recorded and raised."""
    planned = run.plan([cell])[0]
    if planned.error is None and run.is_done(planned):
        run.progress.note(f"{cell.name}: finished before, skipped")
        return write_table(cells, run.place)
    try:
        run.place.record(cell.name).unlink(missing_ok=True)
        run_cell(planned, run.place, until=run.until, command=command, force=run.force, progress=run.progress)
    finally:
        found = write_table(cells, run.place)
    return found


def write_table(cells: Sequence[Cell], place: Place) -> dict[str, Any]:
    """sweep.json, table.csv and table.md from the records as they are now; returns what the first one holds."""
    with place.writing():
        found = document(cells, place)
        place.replace_text("sweep.json", json.dumps(found, indent=2) + "\n")
        place.replace_text("table.csv", as_csv(found))
        place.replace_text("table.md", markdown(found))
    return found


def _settle_without_work(run: Run, planned: Sequence[PlannedCell]) -> list[PlannedCell]:
    """Record what needs no run; returns the rest, whose old records are taken away: what is there later is new."""
    todo = []
    for item in planned:
        name = item.cell.name
        if item.error is not None:
            run.place.write(name, refused(item))
            run.progress.note(f"{name}: refused, {code_of(item.error)}: {reason(item.error)}")
        elif run.is_done(item):
            run.progress.note(f"{name}: finished before, skipped")
        elif item.twin is not None:
            run.place.write(name, {"state": "same", "same_as": item.twin, "request": item.cell.identity})
            run.progress.note(f"{name}: the same plan as {item.twin}, not run twice")
        else:
            run.place.record(name).unlink(missing_ok=True)
            todo.append(item)
    return todo


def _require_space(place: Place, todo: Sequence[PlannedCell]) -> None:
    """The plans say what will be written; checkpoints that are there take no more."""
    missing = [
        item.plan.estimates.checkpoint_bytes
        for item in todo
        if item.plan is not None and not (place.engine(item.cell.name) / "checkpoint").exists()
    ]
    require_free_bytes(place.directory, sum(missing), what=f"the sweep ({len(missing)} checkpoints)")


def _settle(run: Run, planned: PlannedCell, ended: Ended) -> str:
    """The state of a cell whose process has ended. One that left no record was killed, or crashed."""
    name = planned.cell.name
    state = run.place.read(name).get("state")
    if state is not None:
        return str(state)
    if LOCKED in ended.last_words:
        return "at work in another process, left to that one"
    run.place.write(name, failed(planned, run.until, _death(ended), ended.seconds))
    return "failed"


def _death(ended: Ended) -> ToolchainError:
    how = f"with exit status {ended.status}"
    if ended.status < 0:
        try:
            how = f"by {signal.Signals(-ended.status).name}"
        except ValueError:
            how = f"by signal {-ended.status}"
    return ToolchainError(
        f"its process was ended {how}; last words: {ended.last_words or 'none'}",
        hint="SIGKILL is mostly the kernel's, for want of memory (dmesg tells). Run the sweep again: it goes on there",
        code="TC-183",
    )
