"""The measured numbers of an engine as rows of tables. What was not measured has no row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

QUALITY = (
    ("ppl", "perplexity", "{:.4f}"),
    ("baseline_ppl", "perplexity of the source model", "{:.4f}"),
    ("ppl_increase", "increase of perplexity", "{:+.3%}"),
    ("kl_mean", "KL(source, quantized), mean, nats per token", "{:.6f}"),
    ("kl_median", "KL, median", "{:.6f}"),
    ("kl_p99", "KL, 99th percentile", "{:.6f}"),
    ("reverse_kl_mean", "KL(quantized, source), mean", "{:.6f}"),
    ("top1_agreement", "same most likely token", "{:.3%}"),
    ("top5_agreement", "overlap of the five most likely tokens", "{:.3%}"),
    ("router_agreement", "same experts chosen", "{:.3%}"),
    ("router_set_agreement", "same set of experts for a token", "{:.3%}"),
)
"""Key of the evaluation report, what people call it, how it is written."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    title: str
    value: str
    interval: str = ""
    """95 %, where it was computed."""


def quality(metrics: dict[str, Any] | None) -> list[Figure]:
    report = metrics or {}
    intervals = report.get("intervals") or {}
    return [
        Figure(
            title=title, value=written.format(report[key]), interval=_interval(intervals.get(key), written)
        )
        for key, title, written in QUALITY
        if isinstance(report.get(key), int | float)
    ]


def _interval(bounds: Any, written: str) -> str:
    return " to ".join(written.format(bound) for bound in bounds) if bounds else ""


def tasks(document: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Rows ``task``, ``metric``, ``value``, ``stderr``, ``shots``, ``samples`` of ``run_tasks``'s document."""
    return [
        {
            "task": name,
            "metric": metric,
            "value": f"{found['value']:.4f}",
            "stderr": "" if found.get("stderr") is None else f"{found['stderr']:.4f}",
            "shots": task.get("num_fewshot"),
            "samples": f"{task.get('samples')} of {task.get('documents')}",
        }
        for name, task in ((document or {}).get("results") or {}).items()
        for metric, found in task["metrics"].items()
    ]


def speed(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per level of a benchmark (users at once, or requests per second); nothing where every request failed."""
    return [
        {
            "concurrency": level["concurrency"] or f"{level['rate']:g} per second",
            "ttft": f"{level['ttft_ms']['p50']:.1f}",
            "tpot": f"{level['tpot_ms']['p50']:.2f}",
            "throughput": f"{level['output_tokens_per_s']:.1f}",
            "errors": level["errors"],
        }
        for level in bench.get("levels", ())
        if level.get("ttft_ms") and level.get("tpot_ms")
    ]


def size(count: float | None) -> str:
    """Bytes in a unit that reads well."""
    if count is None:
        return "unknown"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
