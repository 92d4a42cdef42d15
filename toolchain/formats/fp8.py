"""FP8 E4M3, one static scale per tensor for weights and one for activations (W8A8)."""

from __future__ import annotations

from toolchain.formats.base import Format, Stored, scalar

FP8 = Format(
    name="fp8",
    title="FP8 E4M3, per-tensor weights and activations",
    quant_algo="FP8",
    modelopt_preset="FP8_DEFAULT_CFG",
    modelopt_format="fp8",
    weight_bits=8,
    activation="fp8",
    stored=(
        Stored(suffix="weight", dtype="F8_E4M3", shape=lambda n, k: (n, k)),
        Stored(suffix="weight_scale", dtype="F32", shape=scalar, scale=True),
        Stored(suffix="input_scale", dtype="F32", shape=scalar, scale=True),
    ),
    equal_in_fused=("weight_scale", "input_scale"),
    requantized_in_fused=True,
    moe_default_policy="all-linear",
)
