"""Which stored formats the kernels read, and how: declarations, no triton here."""

from __future__ import annotations

from dataclasses import dataclass

UNIT = 32
"""Elements of in_features that are packed together. In four bits byte j of a unit holds element j in its low nibble and
element 16 + j in its high one, so that both nibbles of a tile are a matrix of their own without any shuffling."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one stored format is held in GPU memory."""

    format: str
    """Name of the Format (``toolchain/formats``)."""
    code: str
    """Elements: ``e2m1``, ``int4`` or ``e4m3``; ``e2m1x``: E2M1 multiplied as it is, in the order of the files."""
    scales: str
    """Scales beside the factor of each row: ``e4m3``, ``e8m0`` or ``float32`` per group, ``block`` (float32 for
    128 x 128 elements) or ``none``."""
    group: int
    """Elements of in_features under one scale; 0 where the factor of the row is the only one."""
    rounding: str
    """What tensor cores that know FP8 make of the inputs: ``none`` (weights alone are quantized), ``tensor`` (static),
    ``token`` or ``group`` (dynamic, of 128); ``nvfp4`` (under a static scale)."""
    channel: bool = False
    """Whether a factor for each input channel may be stored (AWQ)."""

    @property
    def bits(self) -> int:
        return 8 if self.code == "e4m3" else 4

    @property
    def multiplies_sums(self) -> bool:
        """Scales of 128 elements multiply partial sums: the products before them are exact."""
        return self.scales in ("float32", "block")


KINDS = {
    kind.format: kind
    for kind in (
        Kind(format="nvfp4", code="e2m1", scales="e4m3", group=16, rounding="none"),
        Kind(format="w4a16_nvfp4", code="e2m1", scales="e4m3", group=16, rounding="none"),
        Kind(format="mxfp4", code="e2m1", scales="e8m0", group=32, rounding="none"),
        Kind(format="int4_awq", code="int4", scales="float32", group=128, rounding="none", channel=True),
        Kind(format="int4_gptq", code="int4", scales="float32", group=128, rounding="none", channel=True),
        Kind(format="fp8", code="e4m3", scales="none", group=0, rounding="tensor"),
        Kind(format="fp8_per_channel_per_token", code="e4m3", scales="none", group=0, rounding="token"),
        Kind(format="fp8_block", code="e4m3", scales="block", group=128, rounding="group"),
    )
}
"""Format name -> Kind. Formats that are not here run decoded (``modeling/loading.py``)."""
W4A4 = Kind(format="nvfp4", code="e2m1x", scales="e4m3", group=16, rounding="nvfp4")
"""NVFP4 where the tensor cores multiply it: Blackwell."""
NATIVE_FP4 = ((10, 0), (10, 3), (11, 0), (12, 0))
"""Compute capabilities for which triton 3.7 compiles such products (``aot.py``); for 12.1 (GB10) it does not."""


def kind_of(format: str, capability: tuple[int, int] | None = None) -> Kind | None:
    """How weights of ``format`` are held on a GPU of this compute capability (None: the interpreter's)."""
    if format == "nvfp4" and capability in NATIVE_FP4:
        return W4A4
    return KINDS.get(format)
