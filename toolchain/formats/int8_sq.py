"""INT8 SmoothQuant: one scale per output channel, one static scale for the input (W8A8)."""

from __future__ import annotations

from toolchain.formats.base import PRE_QUANT_SCALE, Format, Stored, scalar

INT8_SQ = Format(
    name="int8_sq",
    title="INT8 SmoothQuant, per-channel weights, per-tensor activations",
    quant_algo="W8A8_SQ_PER_CHANNEL",
    modelopt_preset="INT8_SMOOTHQUANT_CFG",
    modelopt_format="int8_sq",
    weight_bits=8,
    activation="int8",
    stored=(
        Stored(suffix="weight", dtype="I8", shape=lambda n, k: (n, k)),
        Stored(suffix="weight_scale", dtype="F32", shape=lambda n, k: (n,), scale=True),
        Stored(suffix="input_scale", dtype="F32", shape=scalar, scale=True),
        PRE_QUANT_SCALE,
    ),
    equal_in_fused=("input_scale",),
    moe_default_policy="all-linear",
    default_recipe="smoothquant",
)
