"""The embedded runtime: fused kernels on packed weights on GPUs, the formats' arithmetic emulated elsewhere."""

from __future__ import annotations

from toolchain import __version__
from toolchain.formats import FORMATS, KV_CACHES
from toolchain.targets.base import ANY_SM, Row, Target

PACKED = (
    "fp8",
    "fp8_block",
    "fp8_per_channel_per_token",
    "int4_awq",
    "int4_gptq",
    "mxfp4",
    "nvfp4",
    "w4a16_nvfp4",
)
"""Formats that ``toolchain/kernels`` multiplies (its KINDS; a test compares)."""
PACKED_SINCE = 80
KERNELS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
"""SMs that Triton compiles for."""

LOCAL = Target(
    name="local",
    title="Embedded runtime (PyTorch and transformers, CPU or GPU)",
    default_version=__version__,
    versions=(__version__,),
    rows=(
        Row(
            formats=PACKED,
            sms=KERNELS,
            note="packed in memory, fused kernels in Triton; W4A16 for 4 bits below SM 100, and NVFP4 on 121",
        ),
        Row(
            # Every format has a codec, and the runtime needs no more.
            formats=tuple(item.name for item in FORMATS),
            sms=ANY_SM,
            note="emulated: exact values of the format, speed of PyTorch",
        ),
    ),
    kv_rows=(Row(formats=tuple(name for name in KV_CACHES if name != "none"), sms=ANY_SM),),
    head_rows=(Row(formats=tuple(item.name for item in FORMATS), sms=ANY_SM),),
    needs_gpu=False,
    parallel=False,
    emulates=True,
    packed=PACKED,
    packed_kv=("fp8", "fp8_cast"),
    packed_since=PACKED_SINCE,
    dense_because="the embedded runtime multiplies with every zero",
)
