"""Where things lie. All of it is under ``build/accuracy`` (not in git) but the assembled result."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "accuracy"
MODELS = BUILD / "models"
RUNS = BUILD / "results"
"""One JSON per (model, method, seed)."""
DATA = BUILD / "data"
"""Calibration and evaluation tokens, logits of the source models."""
SCRATCH = BUILD / "scratch"
"""Checkpoints and logits of the run in progress; removed after it."""
PEER_PYTHON = BUILD / "llmcompressor-venv" / "bin" / "python"
RESULT = ROOT / "benchmarks" / "results" / "accuracy.json"


def run_file(model: str, method: str, seed: int) -> Path:
    return RUNS / f"{model}--{method}--{seed}.json"
