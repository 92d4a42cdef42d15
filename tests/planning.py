"""Plans for tests: a tiny model, a format, and calibration text that every checkout has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from toolchain.models.reader import read_model
from toolchain.plan.planner import make_plan, require_clean
from toolchain.plan.types import Calibration, Plan

TEXT = Path(__file__).parent / "data" / "text" / "core"
"""Thousands of bytes, one token each with the tokenizer of the tiny models; the same whatever becomes of the code."""


def plan_for(model: Path, format: str, **options: Any) -> Plan:
    """A clean plan of ``model`` with little calibration data."""
    calibration = Calibration(data=str(TEXT), samples=8, length_tokens=128)
    return require_clean(make_plan(read_model(str(model)), format=format, calibration=calibration, **options))


def with_calibration(plan: Plan, **changes: Any) -> Plan:
    """``plan`` with other calibration settings."""
    return replace(plan, calibration=replace(plan.calibration, **changes))


def export(done: Any, directory: Path) -> Path:
    """What a ``Quantized`` model in memory is written as, in a new ``directory``."""
    from toolchain.core.progress import Silent

    directory.mkdir()
    done.exporter.write(directory, Silent())
    return directory
