"""INT8 weights with one FP32 scale per output channel (W8A16)."""

from __future__ import annotations

from toolchain.formats.base import Format, Stored

INT8_WO = Format(
    name="int8_wo",
    title="INT8, per-channel, weights only",
    quant_algo="W8A16",
    modelopt_preset="INT8_WEIGHT_ONLY_CFG",
    modelopt_format="int8_wo",
    weight_bits=8,
    activation="bf16",
    stored=(
        Stored(suffix="weight", dtype="I8", shape=lambda n, k: (n, k)),
        Stored(suffix="weight_scale", dtype="F32", shape=lambda n, k: (n,), scale=True),
    ),
    moe_default_policy="all-linear",
)
