"""Codecs: pack and unpack each stored format, bit-exact with ModelOpt. One file per kind of numbers."""

from __future__ import annotations

from toolchain.codecs.base import Calibrated, Codec, scale_input
from toolchain.codecs.fp8 import Fp8Codec
from toolchain.codecs.fp8_block import Fp8BlockCodec
from toolchain.codecs.fp8_per_channel_per_token import Fp8PerChannelPerTokenCodec
from toolchain.codecs.int4_awq import INT4_CODECS
from toolchain.codecs.int8 import Int8SqCodec, Int8WoCodec
from toolchain.codecs.mxfp import Mxfp4Codec, Mxfp8Codec
from toolchain.codecs.nvfp4 import Nvfp4Codec, W4A8Nvfp4Fp8Codec, W4A16Nvfp4Codec

_CODECS: tuple[Codec, ...] = (
    Fp8Codec(),
    Fp8BlockCodec(),
    Fp8PerChannelPerTokenCodec(),
    Nvfp4Codec(),
    W4A16Nvfp4Codec(),
    W4A8Nvfp4Fp8Codec(),
    Mxfp4Codec(),
    Mxfp8Codec(),
    *INT4_CODECS,
    Int8SqCodec(),
    Int8WoCodec(),
)


def get_codec(format_name: str) -> Codec:
    """The codec of a format. KeyError for a format without one is a bug: a test compares with ``FORMATS``."""
    return {codec.format.name: codec for codec in _CODECS}[format_name]


__all__ = ["Calibrated", "Codec", "get_codec", "scale_input"]
