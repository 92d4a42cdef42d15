"""FP8 E4M3, one FP32 scale per 128 x 128 weights, activations in groups of 128 per token (DeepSeek-V3's recipe)."""

from __future__ import annotations

from toolchain.formats.base import Format, Stored

BLOCK = 128

FP8_BLOCK = Format(
    name="fp8_block",
    title="FP8 E4M3, weights in blocks of 128 x 128, activations in groups of 128",
    quant_algo="FP8_BLOCK_SCALES",
    algo_aliases=("FP8_PB_WO", "fp8_pb_wo"),
    modelopt_preset="FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    modelopt_format="fp8_pb_wo",
    weight_bits=8,
    activation="fp8_group",
    stored=(
        Stored(suffix="weight", dtype="F8_E4M3", shape=lambda n, k: (n, k)),
        Stored(
            suffix="weight_scale_inv",
            dtype="F32",
            aliases=("weight_scale",),
            shape=lambda n, k: (-(-n // BLOCK), -(-k // BLOCK)),
            scale=True,
        ),
    ),
    group_size=BLOCK,
    moe_default_policy="all-linear",
)
