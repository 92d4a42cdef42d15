"""The recipe that our own measurements show best, per format: benchmarks/results/accuracy.json says how much.

A format that is not listed has no recipe that wins outside of the noise: its default is its best.
"""

from __future__ import annotations

BEST: dict[str, str] = {}
