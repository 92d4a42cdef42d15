"""Sweeps of a tiny model, for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

GRID = {"formats": ["w4a16_nvfp4", "nvfp4"], "recipes": ["max", "mse"]}
NAMES = [f"small-{name}" for name in ("w4a16_nvfp4-max", "w4a16_nvfp4-mse", "nvfp4-max", "nvfp4-mse")]
"""The cells of GRID."""


def make_root(model: Path, root: Path) -> Path:
    """A copy of ``model`` with held-out text, and text to calibrate on."""
    shutil.copytree(model, root / "model")
    lines = [f"def f{i}(x):\n    return x * {i} + {i % 7}  # {i:b}\n" for i in range(60)]
    (root / "texts.txt").write_text("".join(lines))
    held_out = "".join(line.replace("def f", "def g") for line in lines)
    (root / "model" / "evaluation.jsonl").write_text(json.dumps({"text": held_out}) + "\n")
    return root


def write_spec(root: Path, file: str = "spec", /, **changes: Any) -> Path:
    """A SPEC of the model below ``root``; None takes a key out."""
    base = {
        "calib_data": str(root / "texts.txt"),
        "calib_samples": 8,
        "calib_length": 64,
        "eval_tokens": 1024,
    }
    spec = {"models": {"small": str(root / "model")}, **GRID, "base": base, **changes}
    path = root / f"{file}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in spec.items() if value is not None}))
    return path


def rows(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cell -> its row of sweep.json."""
    return {row["cell"]: row for row in document["cells"]}
