"""W4A8 AWQ: INT4 weights in groups of 128, expanded to FP8 under one scale per tensor; FP8 activations."""

from __future__ import annotations

from toolchain.formats.base import PRE_QUANT_SCALE, Format, Stored, scalar

W4A8_AWQ = Format(
    name="w4a8_awq",
    title="INT4 AWQ weights in groups of 128, per-tensor FP8 activations",
    quant_algo="W4A8_AWQ",
    modelopt_preset="W4A8_AWQ_BETA_CFG",
    modelopt_format="w4a8_awq",
    weight_bits=4,
    activation="fp8",
    stored=(
        Stored(suffix="weight", dtype="U8", shape=lambda n, k: (n // 2, k)),
        Stored(suffix="weight_scale", dtype="F32", shape=lambda n, k: (n, k // 128), scale=True),
        Stored(suffix="weight_scale_2", dtype="F32", shape=scalar, scale=True),
        Stored(suffix="input_scale", dtype="F32", shape=scalar, scale=True),
        PRE_QUANT_SCALE,
    ),
    group_size=128,
    in_multiple=128,
    out_multiple=2,
    equal_in_fused=("weight_scale_2", "input_scale"),
    default_recipe="awq",
)
