"""Where things lie. All of it is under ``build/streaming`` (not in git) but the assembled result."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "streaming"
MODELS = BUILD / "models"
RUNS = BUILD / "results"
"""One JSON per (model, method)."""
SCRATCH = BUILD / "scratch"
"""The output of the run in progress; removed after it."""
RESULT = ROOT / "benchmarks" / "results" / "streaming.json"
MARKDOWN = ROOT / "benchmarks" / "results" / "streaming.md"
"""The table, as it stands in the README."""
DEVICE_RECORD = RUNS / "device.json"


def run_file(model: str, method: str) -> Path:
    return RUNS / f"{model}--{method}.json"
