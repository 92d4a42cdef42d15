"""FP8 E4M3, one scale per output channel, activations scaled per token at run time (W8A8)."""

from __future__ import annotations

from toolchain.formats.base import Format, Stored

FP8_PER_CHANNEL_PER_TOKEN = Format(
    name="fp8_per_channel_per_token",
    title="FP8 E4M3, per-channel weights, per-token activations",
    quant_algo="FP8_PER_CHANNEL_PER_TOKEN",
    modelopt_preset="FP8_PER_CHANNEL_PER_TOKEN_CFG",
    modelopt_format="fp8_pc_pt",
    weight_bits=8,
    activation="fp8_token",
    stored=(
        Stored(suffix="weight", dtype="F8_E4M3", shape=lambda n, k: (n, k)),
        Stored(suffix="weight_scale", dtype="F32", shape=lambda n, k: (n,), scale=True),
    ),
    moe_default_policy="all-linear",
)
