"""What one engine is and costs, read from the files that its stages wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.report.documents import Document, interval, number, part, parts
from toolchain.report.identity import groups_of
from toolchain.report.inputs import EngineFiles, read_engine
from toolchain.report.sections.summary import effective_bits

MEASURED = ("ppl", "kl_mean", "top1_agreement", "router_agreement")
"""Figures of metrics.json that have an interval, and become columns."""


def figures_of(engine: Path) -> dict[str, Any]:
    """JSON; None for what was not measured. Sizes are of the safetensors files as they lie on disk."""
    files = read_engine(engine)
    group = groups_of([files])[0]
    source, written = number(part(files.plan, "estimates"), "source_bytes"), files.shard_bytes
    found: dict[str, Any] = {
        "recipe": files.plan.get("recipe"),
        "policy": files.plan.get("policy"),
        "effective_bits": effective_bits(files),
        "bytes": written,
        "source_bytes": source,
        "compression": source / written if source and written else None,
        "tokens": number(files.metrics, "tokens"),
        "baseline_ppl": number(files.metrics, "baseline_ppl"),
    }
    for name in MEASURED:
        ends = interval(files.metrics, name)
        found |= {name: number(files.metrics, name), f"{name}_interval": list(ends) if ends else None}
    return {
        **found,
        "starved_experts": _starved(files),
        "gates": [
            {key: gate.get(key) for key in ("gate", "limit", "value", "passed")} for gate in _gates(files)
        ],
        "seconds": sum(number(record, "seconds") or 0.0 for record in _records(files)),
        "peak_memory_bytes": max(
            (number(record, "peak_memory_bytes") or 0 for record in _records(files)), default=None
        ),
        "measured_alike": "/".join(group.values) if group else None,
    }


def _starved(files: EngineFiles) -> float | None:
    """Experts below the asked number of calibration tokens; None where nothing was counted."""
    return number(part(files.quantize, "coverage"), "starved")


def _gates(files: EngineFiles) -> list[Document]:
    return parts(files.gates, "gates")


def _records(files: EngineFiles) -> list[Document]:
    return [record for record in files.stages.values() if isinstance(record, dict)]
