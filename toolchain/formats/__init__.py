"""Formats: how numbers are stored and computed. A new format is one file here and one entry in ``FORMATS``."""

from __future__ import annotations

from toolchain.core.lookup import pick
from toolchain.formats.base import DTYPE_BYTES, Format, Stored
from toolchain.formats.fp8 import FP8
from toolchain.formats.int4_awq import INT4_AWQ
from toolchain.formats.nvfp4 import NVFP4

FORMATS: tuple[Format, ...] = (FP8, NVFP4, INT4_AWQ)

KV_CACHES: tuple[str, ...] = ("none", "fp8")
"""KV cache formats: ``none`` keeps the model's dtype; ``fp8`` stores E4M3 with one calibrated scale per K and V."""


def get_format(name: str) -> Format:
    """The format called ``name``; UsageError lists the alternatives."""
    hint = "`toolchain list formats` describes each"
    return pick(FORMATS, name, kind="format", hint=hint, code="TC-101")


def format_of_algo(quant_algo: str) -> Format | None:
    """The format that writes ``quant_algo`` into hf_quant_config.json, or None."""
    return next((item for item in FORMATS if item.quant_algo == quant_algo), None)


__all__ = ["DTYPE_BYTES", "FORMATS", "KV_CACHES", "Format", "Stored", "format_of_algo", "get_format"]
