"""INT4 AWQ: symmetric 4-bit integers, one scale per 128 elements, activation-aware channel scales (W4A16)."""

from __future__ import annotations

from toolchain.formats.base import PRE_QUANT_SCALE, Format, Stored

INT4_AWQ = Format(
    name="int4_awq",
    title="INT4 AWQ, groups of 128, weights only",
    quant_algo="W4A16_AWQ",
    modelopt_preset="INT4_AWQ_CFG",
    modelopt_format="int4_awq",
    weight_bits=4,
    activation="bf16",
    stored=(
        Stored(suffix="weight", dtype="U8", shape=lambda n, k: (n // 2, k)),
        Stored(suffix="weight_scale", dtype="F32", shape=lambda n, k: (n, k // 128), scale=True),
        PRE_QUANT_SCALE,
    ),
    group_size=128,
    in_multiple=128,
    out_multiple=2,
    equal_in_fused=(),
    default_recipe="awq",
)
