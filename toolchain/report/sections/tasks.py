"""Scores of lm-evaluation-harness."""

from __future__ import annotations

from toolchain.report.blocks import Cell, Column, Section, missing, table
from toolchain.report.documents import Document, number, part, text
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import NOTHING, percent, significant


def section(files: EngineFiles) -> Section:
    title = "Tasks (lm-evaluation-harness)"
    rows: list[list[Cell | str]] = []
    for task, found in task_results(files).items():
        for metric, value, error in scores(found):
            show = percent if 0 <= value <= 1 else significant
            detail = f"± {show(error)}" if error is not None else ""
            shots, samples = number(found, "num_fewshot"), number(found, "samples")
            rows.append(
                [
                    text(found, "alias").strip(" -") or task,
                    metric,
                    Cell(text=show(value), value=value, detail=detail),
                    Cell(text=significant(shots, 1) if shots is not None else NOTHING, value=shots),
                    Cell(text=_documents(found), value=samples),
                ]
            )
    if not rows:
        remedy = f"run `toolchain evaluate {files.where} --tasks NAME`"
        return Section(id="tasks", short="Tasks", title=title, blocks=(missing("Tasks were", remedy),))
    columns = [Column(title="Task"), Column(title="Metric")]
    columns += [Column(title=name, numeric=True) for name in ("Score", "Shots", "Documents")]
    found_table = table("Scores with standard errors", columns, rows)
    return Section(id="tasks", short="Tasks", title=title, blocks=(found_table,))


def _documents(found: Document) -> str:
    samples, documents = text(found, "samples"), text(found, "documents")
    return f"{samples} of {documents}" if samples and documents else samples or NOTHING


def task_results(files: EngineFiles) -> dict[str, Document]:
    """Task -> its result: from tasks.json, else from the metrics, where results may stand below ``results``."""
    tasks = files.tasks or part(files.metrics, "tasks")
    inner = part(tasks, "results") or tasks
    return {name: part(inner, name) for name in sorted(inner) if part(inner, name)}


def scores(found: Document) -> list[tuple[str, float, float | None]]:
    """(metric, value, standard error), as ``tasks.json`` has them or as the harness itself does."""
    metrics = part(found, "metrics")
    if metrics:
        named = [(name, part(metrics, name)) for name in metrics]
        pairs = [(name, number(item, "value"), number(item, "stderr")) for name, item in named]
        return [(name, value, error) for name, value, error in pairs if value is not None]
    return _of_harness(found)


def _of_harness(found: Document) -> list[tuple[str, float, float | None]]:
    """Keys are ``metric,filter`` and ``metric_stderr,filter``; others are settings."""
    rows = []
    for key in found:
        metric, comma, filter_name = key.partition(",")
        value = number(found, key)
        if value is None or not comma or metric.endswith("_stderr"):
            continue
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        rows.append((name, value, number(found, f"{metric}_stderr,{filter_name}")))
    return rows
