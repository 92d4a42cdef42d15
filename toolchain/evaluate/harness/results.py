"""What the harness reports, in a form that is small, stable and comparable."""

from __future__ import annotations

from typing import Any

from toolchain.core.files import sha256_json

NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


def tell(raw: dict[str, Any]) -> dict[str, Any]:
    """``results`` (one entry per task) and ``groups`` (aggregates over tasks) of ``simple_evaluate``'s answer.

    A task has ``metrics`` (name -> value, stderr, higher_is_better; ``name@filter`` where a task filters answers),
    ``version``, ``num_fewshot``, ``samples`` that were scored, ``documents`` that the task has, ``config_hash`` of the
    task's definition and ``prompts_hash`` of what the model was shown: figures compare where both are equal.
    """
    groups = raw.get("groups") or {}
    configs = raw["configs"]
    results = {name: _task(name, raw) for name in raw["results"] if name in configs}
    return {
        "results": results,
        "groups": {name: {"metrics": _metrics(name, values, raw)} for name, values in groups.items()},
    }


def _task(name: str, raw: dict[str, Any]) -> dict[str, Any]:
    counts = raw["n-samples"][name]
    samples = raw["samples"][name]
    # Where a task came from on this disk says nothing about what it asks.
    config = {key: value for key, value in raw["configs"][name].items() if key != "metadata"}
    return {
        "metrics": _metrics(name, raw["results"][name], raw),
        "version": raw["versions"].get(name),
        "num_fewshot": raw["n-shot"].get(name),
        "samples": counts["effective"],
        "documents": counts["original"],
        "config_hash": sha256_json(_plain(config)),
        "prompts_hash": sha256_json(sorted([item["doc_id"], item["prompt_hash"]] for item in samples)),
    }


def _metrics(name: str, values: dict[str, Any], raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    better = raw["higher_is_better"].get(name) or {}
    found = {}
    for key, value in values.items():
        metric, _, kept = key.partition(",")
        if key in NOT_METRICS or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = metric if kept in ("", "none") else f"{metric}@{kept}"
        error = values.get(f"{metric}_stderr,{kept}")
        found[label] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
            "higher_is_better": better.get(metric),
        }
    return found


def _plain(value: Any) -> Any:
    """JSON of a task's configuration, with functions by their text or name."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
