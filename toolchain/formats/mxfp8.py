"""MXFP8: E4M3 weights and activations, one power of two (E8M0) per 32 elements (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from toolchain.formats.base import Format, Stored

MXFP8 = Format(
    name="mxfp8",
    title="MXFP8 E4M3, blocks of 32 with E8M0 scales, weights and activations",
    quant_algo="MXFP8",
    modelopt_preset="MXFP8_DEFAULT_CFG",
    modelopt_format="mxfp8",
    weight_bits=8,
    activation="mxfp8",
    stored=(
        Stored(suffix="weight", dtype="F8_E4M3", shape=lambda n, k: (n, k)),
        Stored(suffix="weight_scale", dtype="U8", shape=lambda n, k: (n, k // 32), scale=True),
    ),
    group_size=32,
    in_multiple=32,
    moe_default_policy="all-linear",
)
