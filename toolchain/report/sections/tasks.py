"""Scores of lm-evaluation-harness."""

from __future__ import annotations

from toolchain.report.blocks import Cell, Column, Section, missing, table
from toolchain.report.documents import Document, number, part, text
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import percent, significant


def section(files: EngineFiles) -> Section:
    title = "Tasks (lm-evaluation-harness)"
    rows: list[list[Cell | str]] = []
    for task, scores in task_scores(files.metrics).items():
        for metric, value, error in _scores(scores):
            show = percent if 0 <= value <= 1 else significant
            detail = f"± {show(error)}" if error is not None else ""
            rows.append(
                [
                    text(scores, "alias").strip(" -") or task,
                    metric,
                    Cell(text=show(value), value=value, detail=detail),
                ]
            )
    if not rows:
        remedy = f"run `toolchain evaluate {files.where} --tasks NAME`"
        return Section(id="tasks", short="Tasks", title=title, blocks=(missing("Tasks were", remedy),))
    columns = [Column(title="Task"), Column(title="Metric"), Column(title="Score", numeric=True)]
    return Section(
        id="tasks", short="Tasks", title=title, blocks=(table("Scores with standard errors", columns, rows),)
    )


def task_scores(metrics: Document) -> dict[str, Document]:
    """Task -> its scores; harness results nest them below ``results``."""
    tasks = part(metrics, "tasks")
    inner = part(tasks, "results") or tasks
    return {name: part(inner, name) for name in sorted(inner) if part(inner, name)}


def _scores(scores: Document) -> list[tuple[str, float, float | None]]:
    """(metric, value, standard error). Keys of the harness are ``metric,filter`` and ``metric_stderr,filter``."""
    found = []
    for key in scores:
        metric, _, filter_name = key.partition(",")
        value = number(scores, key)
        if value is None or metric.endswith("_stderr") or metric in ("alias", "sample_len", "samples"):
            continue
        error = number(scores, f"{metric}_stderr,{filter_name}" if filter_name else f"{metric}_stderr")
        name = metric if filter_name in ("", "none") else f"{metric} ({filter_name})"
        found.append((name, value, error))
    return found
