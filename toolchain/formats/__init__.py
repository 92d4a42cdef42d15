"""Formats: how numbers are stored and computed. A new format is one file here and one entry in ``FORMATS``."""

from __future__ import annotations

from toolchain.core.lookup import pick
from toolchain.formats.base import DTYPE_BYTES, WEIGHT_SCALES, Format, Stored, same_stored
from toolchain.formats.fp8 import FP8
from toolchain.formats.fp8_block import FP8_BLOCK
from toolchain.formats.fp8_per_channel_per_token import FP8_PER_CHANNEL_PER_TOKEN
from toolchain.formats.int4_awq import INT4_AWQ
from toolchain.formats.int4_gptq import INT4_GPTQ
from toolchain.formats.int8_sq import INT8_SQ
from toolchain.formats.int8_wo import INT8_WO
from toolchain.formats.kv import ALL as _KV
from toolchain.formats.kv import KvCache, get_kv_cache
from toolchain.formats.mxfp4 import MXFP4
from toolchain.formats.mxfp8 import MXFP8
from toolchain.formats.nvfp4 import NVFP4
from toolchain.formats.w4a8_awq import W4A8_AWQ
from toolchain.formats.w4a8_nvfp4_fp8 import W4A8_NVFP4_FP8
from toolchain.formats.w4a16_nvfp4 import W4A16_NVFP4

FORMATS: tuple[Format, ...] = (
    FP8,
    FP8_BLOCK,
    FP8_PER_CHANNEL_PER_TOKEN,
    NVFP4,
    W4A16_NVFP4,
    W4A8_NVFP4_FP8,
    MXFP4,
    MXFP8,
    INT4_AWQ,
    INT4_GPTQ,
    W4A8_AWQ,
    INT8_SQ,
    INT8_WO,
)

KV_CACHES: tuple[str, ...] = tuple(item.name for item in _KV)
"""Names of the KV cache formats (``toolchain.formats.kv``)."""


def get_format(name: str) -> Format:
    """The format called ``name``; UsageError lists the alternatives."""
    hint = "`toolchain list formats` describes each"
    return pick(FORMATS, name, kind="format", hint=hint, code="TC-101")


def format_of_algo(quant_algo: str) -> Format | None:
    """The format stored under ``quant_algo`` in hf_quant_config.json, or None.

    Of formats with the same layout (``same_stored``) the first: bytes do not say who chose them.
    """
    return next(
        (item for item in FORMATS if quant_algo == item.quant_algo or quant_algo in item.algo_aliases), None
    )


__all__ = [
    "DTYPE_BYTES",
    "FORMATS",
    "KV_CACHES",
    "WEIGHT_SCALES",
    "Format",
    "KvCache",
    "Stored",
    "format_of_algo",
    "get_format",
    "get_kv_cache",
    "same_stored",
]
