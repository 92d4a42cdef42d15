"""Families: how each model family names its parts. A new family is one file here and one entry in ``FAMILIES``."""

from __future__ import annotations

from toolchain.families.base import Family, Part
from toolchain.families.qwen3_moe import QWEN3_MOE

FAMILIES: tuple[Family, ...] = (QWEN3_MOE,)

__all__ = ["FAMILIES", "Family", "Part"]
