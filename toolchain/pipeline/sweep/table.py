"""The document as a table: for a terminal and for Markdown, and as CSV with every figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolchain.pipeline.sweep.front import Row
from toolchain.report.numbers import NOTHING, PERCENT, percent, seconds, significant, size

HEADERS = (
    "cell", "format", "recipe", "KV cache", "bits", "size", "smaller", "perplexity", "mean KL (nats)",
    "top-1", "routers", "starved", "gates", "time", "peak memory", "",
)  # fmt: skip
NUMERIC = range(4, 15)
LEGEND = (
    "front: no other cell of the model is as small and as good, and better in one (size against mean KL).\n"
    "~: a cell that is no larger has a KL whose 95 % interval overlaps: which one is better is not known.\n"
    "In brackets: 95 % intervals. Seconds are of all stages, memory is the largest of one."
)
CSV_INTERVALS = ("ppl", "kl_mean", "top1_agreement", "router_agreement")
LEFT_OUT = (
    "standing", "gates", "error", "measured_alike", *(f"{name}_interval" for name in CSV_INTERVALS),
)  # fmt: skip
"""Keys of a row that are no single figure: CSV has parts of them."""


def groups(document: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(heading, rows of cells as text) per model."""
    models = dict.fromkeys(row["model"] for row in document["cells"])
    found = []
    for model in models:
        rows = [row for row in document["cells"] if row["model"] == model]
        found.append((_heading(str(model), rows), [_cells(row) for row in rows]))
    return found


def problems(document: dict[str, Any]) -> list[str]:
    """A line for each cell without figures that says why."""
    return [
        f"{row['cell']}: {row['state']}, {row['error']['code']}: {row['error']['message']}"
        for row in document["cells"]
        if row["error"]
    ]


def markdown(document: dict[str, Any]) -> str:
    """table.md."""
    lines = [f"# Sweep {document['name']}", "", counts(document), ""]
    rule = "|" + "|".join("---:" if index in NUMERIC else "---" for index in range(len(HEADERS))) + "|"
    for heading, rows in groups(document):
        lines += [f"## {heading}", "", _line(HEADERS), rule, *map(_line, rows), ""]
    lines += [LEGEND, ""]
    said = problems(document)
    if said:
        lines += ["## Cells without figures", "", *(f"- {line}" for line in said), ""]
    return "\n".join(lines)


def as_csv(document: dict[str, Any]) -> str:
    """table.csv: figures as they were measured, unrounded; columns have the names of sweep.json."""
    out = io.StringIO()
    rows = [_flat(row) for row in document["cells"]]
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def counts(document: dict[str, Any]) -> str:
    found = [f"{count} {state}" for state, count in document["states"].items() if count]
    number = len(document["cells"])
    return f"{number} cell{'s' * (number != 1)}: {', '.join(found)}."


def _heading(model: str, rows: Sequence[Row]) -> str:
    """The model, its size and its perplexity on the text of the cells."""
    name = str(Path(model).name if Path(model).is_absolute() else model)
    sizes = {row["source_bytes"] for row in rows if row["source_bytes"]}
    texts = {row["measured_alike"]: row["baseline_ppl"] for row in rows if row["baseline_ppl"]}
    said = [size(value) for value in sizes]
    if len(texts) == 1:
        said.append(f"perplexity {significant(next(iter(texts.values())), 4)}")
    elif texts:
        said.append("measured on several texts, of which only cells of one text compare")
    return f"{name} ({', '.join(said)})" if said else name


def _cells(row: Row) -> tuple[str, ...]:
    shown = row["resolved_recipe"] or row["recipe"]
    recipe = shown if shown == row["recipe"] else f"{row['recipe']} ({shown})"
    state = row["state"] if row["state"] not in ("finished", "same") else row["mark"]
    return (
        row["cell"],
        str(row["format"]),
        recipe if row["state"] != "same" else f"{recipe}, as {row['same_as']}",
        str(row["kv_cache"]),
        significant(row["effective_bits"]),
        size(row["bytes"]),
        NOTHING if row["compression"] is None else f"{row['compression']:.2f}x",
        _with_interval(row, "ppl", lambda value: significant(value, 4)),
        _with_interval(row, "kl_mean", significant),
        _with_interval(row, "top1_agreement", _share),
        _with_interval(row, "router_agreement", _share),
        NOTHING if row["starved_experts"] is None else f"{row['starved_experts']:.0f}",
        gates_text(row["gates"]),
        seconds(row["seconds"]),
        size(row["peak_memory_bytes"]),
        state,
    )


def gates_text(gates: list[dict[str, Any]] | None) -> str:
    failed = [str(gate["gate"]) for gate in gates or () if not gate["passed"]]
    return NOTHING if not gates else f"failed {', '.join(failed)}" if failed else "passed"


def _with_interval(row: Row, name: str, show: Any) -> str:
    ends = row[f"{name}_interval"]
    return show(row[name]) + (f" [{show(ends[0])}, {show(ends[1])}]" if ends else "")


def _share(value: float | None) -> str:
    return percent(value, 1).replace(PERCENT, "%")


def _flat(row: Row) -> dict[str, Any]:
    found = {key: value for key, value in row.items() if key not in LEFT_OUT}
    for name in CSV_INTERVALS:
        low, high = row[f"{name}_interval"] or (None, None)
        found |= {f"{name}_low": low, f"{name}_high": high}
    standing = row["standing"] or {}
    found |= {key: standing.get(key) for key in ("on_front", "is_certain")}
    found["not_told_apart"] = " ".join(standing.get("not_told_apart", ()))
    found["gates"] = gates_text(row["gates"]) if row["gates"] else None
    return {**found, "error": (row["error"] or {}).get("code")}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
