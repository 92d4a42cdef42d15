"""The embedded runtime: PyTorch on any CPU or GPU, with the formats' arithmetic emulated."""

from __future__ import annotations

from toolchain import __version__
from toolchain.formats import FORMATS, KV_CACHES
from toolchain.targets.base import ANY_SM, Row, Target

LOCAL = Target(
    name="local",
    title="Embedded runtime (PyTorch and transformers, CPU or GPU)",
    default_version=__version__,
    versions=(__version__,),
    rows=(
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
    dense_because="the embedded runtime multiplies with every zero",
)
