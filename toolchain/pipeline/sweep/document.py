"""sweep.json: one row per cell, made of the records as they are now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolchain.pipeline.sweep.cells import Cell
from toolchain.pipeline.sweep.front import Row, standings
from toolchain.pipeline.sweep.place import SCHEMA_VERSION, Place

STATES = ("finished", "same", "failed", "begun", "waiting", "refused")
"""``same``: another cell has the same plan, and its figures are shown; ``begun``: killed, at work right now, or made
with other settings than the SPEC has now."""
EMPTY: Row = dict.fromkeys(
    (
        "policy", "effective_bits", "bytes", "source_bytes", "compression", "tokens", "baseline_ppl", "ppl",
        "ppl_interval", "kl_mean", "kl_mean_interval", "top1_agreement", "top1_agreement_interval",
        "router_agreement", "router_agreement_interval", "starved_experts", "gates", "seconds",
        "peak_memory_bytes", "measured_alike",
    )
)  # fmt: skip


def document(cells: Sequence[Cell], place: Place) -> dict[str, Any]:
    """What is known of all cells. Reads the records and nothing else: engines may be gone by now."""
    records = {cell.name: _current(cell, place) for cell in cells}
    rows = [_row(cell, records, place) for cell in cells]
    own = [row for row in rows if row["state"] == "finished"]
    found = standings(own)
    for row in rows:
        standing = found.get(row["same_as"] or row["cell"])
        row["standing"] = standing.to_json() if standing else None
        row["mark"] = standing.mark if standing else ""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": place.directory.resolve().name,
        "directory": str(place.directory),
        "states": {state: sum(row["state"] == state for row in rows) for state in STATES},
        "cells": rows,
    }


def _current(cell: Cell, place: Place) -> dict[str, Any]:
    """The cell's record, unless it is of other values."""
    record = place.read(cell.name)
    return record if record.get("request") == cell.identity else {}


def _row(cell: Cell, records: dict[str, dict[str, Any]], place: Place) -> Row:
    record = records[cell.name]
    state = record.get("state") or ("begun" if place.engine(cell.name).is_dir() else "waiting")
    same_as = record.get("same_as") if state == "same" else None
    shown = records.get(same_as, {}) if same_as else record
    asked = cell.identity
    return {
        "number": cell.number,
        "cell": cell.name,
        "state": state,
        "same_as": same_as,
        "model": asked.get("model"),
        "format": asked.get("format"),
        "recipe": asked.get("recipe") or "default",
        "kv_cache": asked.get("kv_cache", "none"),
        **EMPTY,
        "resolved_recipe": None,
        **_figures(shown),
        "until": shown.get("until"),
        "error": record.get("error"),
        "engine": str(place.engine(same_as or cell.name)),
    }


def _figures(record: dict[str, Any]) -> Row:
    if record.get("state") != "finished":
        return {}
    found = dict(record["figures"])
    return {"resolved_recipe": found.pop("recipe"), **found}
