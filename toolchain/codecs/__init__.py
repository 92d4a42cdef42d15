"""Codecs: pack and unpack each stored format, bit-exact with ModelOpt. One file per format."""

from __future__ import annotations

from toolchain.codecs.base import Calibrated, Codec
from toolchain.codecs.fp8 import Fp8Codec
from toolchain.codecs.int4_awq import Int4AwqCodec
from toolchain.codecs.nvfp4 import Nvfp4Codec

_CODECS: tuple[Codec, ...] = (Fp8Codec(), Nvfp4Codec(), Int4AwqCodec())


def get_codec(format_name: str) -> Codec:
    """The codec of a format. KeyError for a format without one is a bug: a test compares with ``FORMATS``."""
    return {codec.format.name: codec for codec in _CODECS}[format_name]


__all__ = ["Calibrated", "Codec", "get_codec"]
