"""toolchain sweep"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import PATH, dry_run_option, force_option, json_option
from toolchain.cli.output import Terminal, emit, facts, size, table
from toolchain.core.errors import UsageError
from toolchain.quantize.streaming.executor import EXECUTORS, LOCAL

SWEEPS = Path("sweeps")


@click.command(name="sweep")
@click.argument("spec", type=PATH)
@click.option("--output", type=PATH, help="Directory of the sweep. Default: sweeps/<name of SPEC>.")
@click.option(
    "--until",
    type=click.Choice(("quantize", "evaluate", "build")),
    default="evaluate",
    show_default=True,
    help="What is done of each cell: a checkpoint, its measurement too, or a complete engine with its report.",
)
@click.option("--skip-refused", is_flag=True, help="Go on without the cells that cannot be planned.")
@click.option("--only", multiple=True, metavar="NAME", help="Only the cell of this name; may be repeated.")
@click.option("--cell", "number", type=int, metavar="N", help="Only cell number N of --dry-run's list.")
@click.option("--table", "only_table", is_flag=True, help="Show what there is; plan and run nothing.")
@click.option(
    "--executor",
    type=click.Choice(EXECUTORS),
    default=LOCAL,
    show_default=True,
    help="One cell after the other here, or spread over a Ray cluster whose nodes share this directory.",
)
@click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="Head of the cluster. Default: RAY_ADDRESS, or one on this machine.",
)
@click.option("--ray-cpus", type=int, help="CPUs of a cell. Default: a whole node, with its GPUs.")
@dry_run_option
@force_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    spec: Path,
    output: Path | None,
    until: Any,
    skip_refused: bool,
    only: tuple[str, ...],
    number: int | None,
    only_table: bool,
    executor: str,
    ray_address: str | None,
    ray_cpus: int | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make and measure an engine for every cell of a grid (models x formats x recipes ...), into one table.

    SPEC is YAML. A list under a key of an engine spec is an axis; `base` is what all cells have in common:

    \b
      models: [Qwen/Qwen3-30B-A3B, mistralai/Mixtral-8x7B-v0.1]
      formats: [nvfp4, fp8, int4_awq]
      recipes: [default, best]
      kv_cache: [none, fp8]
      base: {calib_data: chats.jsonl, eval_data: held-out.jsonl, max_kl: 0.05}
      exclude: [{format: fp8, recipe: best}]
      include: [{model: Qwen/Qwen3-30B-A3B, format: auto, bits: 5.0}]

    All cells are planned before the first one runs. Each is a process of its own; finished ones are skipped, so the
    same command goes on after a crash or a kill, and with an axis more. A cell that fails is recorded, and the rest
    goes on; exit status 1 in the end. A gate that is not passed is a result, not a failure. With --only NAME or
    --cell N for a single cell, it runs in this process: a job of an array. sweep.json, table.csv and table.md are
    written after each cell.
    """
    from toolchain.pipeline.sweep.cells import cells_of, pick_cells
    from toolchain.pipeline.sweep.place import Place
    from toolchain.pipeline.sweep.run import Run, run_one, run_sweep, write_table
    from toolchain.pipeline.sweep.spec import read_sweep

    cells_by = _executor(executor, ray_address, ray_cpus)
    sweep = read_sweep(spec)
    cells = cells_of(sweep)
    chosen = pick_cells(cells, only, number)
    place = Place(directory=output or SWEEPS / sweep.name)
    run = Run(place=place, until=until, force=force, progress=Terminal())
    if only_table:
        if not (place.directory / "cells").is_dir():
            raise UsageError(f"{place.directory} holds no sweep", hint="run it first", code="TC-182")
        found = write_table(cells, place)
        emit(found, as_json, _text(found))
        return
    if dry_run:
        _dry_run(ctx, run, chosen, skip_refused=skip_refused, as_json=as_json)
        return
    if len(chosen) == 1 and (only or number is not None):
        found = run_one(run, cells, chosen[0], command=["toolchain", *sys.argv[1:]])
        row = next(row for row in found["cells"] if row["cell"] == chosen[0].name)
        emit(row, as_json, facts([("cell", row["cell"]), ("state", row["state"]), ("engine", row["engine"])]))
        return
    found = run_sweep(
        run,
        cells,
        chosen,
        spec=spec.read_text(encoding="utf-8"),
        command=lambda name: _process(place, name, until, force),
        executor=cells_by,
        skip_refused=skip_refused,
    )
    emit(found, as_json, _text(found))
    if found["states"]["failed"]:
        ctx.exit(1)


def _executor(name: str, address: str | None, cpus: int | None) -> Any:
    """UsageError TC-236 for options that do not go together."""
    from toolchain.pipeline.sweep.executors import LocalCells
    from toolchain.quantize.streaming.executor import RAY, ExecutorOptions

    asked = ExecutorOptions(name=name, ray_address=address, ray_cpus=cpus)
    if asked.name != RAY:
        return LocalCells()
    from toolchain.pipeline.sweep.ray_cells import RayCells

    return RayCells(address=address, cpus=cpus)


def _process(place: Any, name: str, until: str, force: bool) -> tuple[str, ...]:
    """What runs one cell by itself, from the SPEC as it is kept: an edit meanwhile changes nothing."""
    words = ["sweep", str(place.spec), "--output", str(place.directory), "--until", until, "--only", name]
    return (sys.executable, "-m", "toolchain.cli.sweep_cell", *words, *["--force"] * force)


def _dry_run(ctx: click.Context, run: Any, chosen: list[Any], *, skip_refused: bool, as_json: bool) -> None:
    from toolchain.pipeline.sweep.planning import code_of, reason

    planned = run.plan(chosen)
    rows = []
    for item in planned:
        figures = item.plan.estimates if item.plan else None
        state = (
            "refused"
            if item.error
            else "finished"
            if run.is_done(item)
            else "same"
            if item.twin
            else "to run"
        )
        rows.append(
            {
                "number": item.cell.number,
                "cell": item.cell.name,
                "state": state,
                "same_as": item.twin if state == "same" else None,
                "checkpoint_bytes": figures.checkpoint_bytes if figures else None,
                "effective_bits": figures.effective_bits if figures else None,
                "quantize_memory_bytes": figures.quantize_memory_bytes if figures else None,
                "quantize_seconds": figures.quantize_seconds if figures else None,
                "error": {"code": code_of(item.error), "message": reason(item.error), "hint": item.error.hint}
                if item.error
                else None,
            }
        )
    emit({"directory": str(run.place.directory), "cells": rows}, as_json, _dry_text(rows))
    if any(item.error for item in planned) and not skip_refused:
        ctx.exit(2)


def _dry_text(rows: list[dict[str, Any]]) -> str:
    shown = [
        (
            row["number"],
            row["cell"],
            row["state"],
            f"{row['effective_bits']:.2f}" if row["checkpoint_bytes"] else "-",
            size(row["checkpoint_bytes"]) if row["checkpoint_bytes"] else "-",
            size(row["quantize_memory_bytes"]) if row["checkpoint_bytes"] else "-",
            f"{row['error']['code']}: {row['error']['message']}" if row["error"] else row["same_as"] or "",
        )
        for row in rows
    ]
    todo = [row for row in rows if row["state"] == "to run"]
    total = sum(row["checkpoint_bytes"] for row in todo)
    head = ("cell", "name", "state", "bits", "checkpoint", "memory", "")
    return f"{table(head, shown)}\n\n{len(todo)} of {len(rows)} cells to run, {size(total)} of checkpoints"


def _text(found: dict[str, Any]) -> str:
    from toolchain.pipeline.sweep.table import HEADERS, LEGEND, counts, groups, problems

    parts = [f"{heading}\n\n{table(HEADERS, rows)}" for heading, rows in groups(found)]
    said = problems(found)
    parts += ["\n".join(said)] if said else []
    where = f"{found['directory']}: sweep.json, table.csv, table.md"
    return "\n\n".join([*parts, LEGEND, f"{counts(found)} Written to {where}"])
