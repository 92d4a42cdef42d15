"""MXFP4 weights: E2M1, one power of two (E8M0) per 32 elements (W4A16; OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from toolchain.formats.base import Format, Stored

MXFP4 = Format(
    name="mxfp4",
    title="MXFP4 E2M1, blocks of 32 with E8M0 scales, weights only",
    quant_algo="W4A16_MXFP4",
    algo_aliases=("MXFP4", "mxfp4"),
    modelopt_preset="MXFP4_MLP_WEIGHT_ONLY_CFG",
    modelopt_format="mxfp4",
    weight_bits=4,
    activation="bf16",
    stored=(
        Stored(suffix="weight", dtype="U8", shape=lambda n, k: (n, k // 2)),
        Stored(suffix="weight_scale", dtype="U8", shape=lambda n, k: (n, k // 32), scale=True),
    ),
    group_size=32,
    in_multiple=32,
)
