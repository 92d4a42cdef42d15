"""The report: one self-contained page of an engine, or of several side by side."""

from __future__ import annotations

from toolchain.report.comparison import write_comparison
from toolchain.report.engine import write_report

__all__ = ["write_comparison", "write_report"]
