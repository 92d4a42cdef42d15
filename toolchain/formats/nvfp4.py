"""NVFP4: E2M1 weights and activations, one E4M3 scale per 16 elements, one FP32 scale per tensor (W4A4)."""

from __future__ import annotations

from toolchain.formats.base import Format, Stored, scalar

NVFP4 = Format(
    name="nvfp4",
    title="NVFP4 E2M1, blocks of 16 with E4M3 scales, weights and activations",
    quant_algo="NVFP4",
    modelopt_preset="NVFP4_DEFAULT_CFG",
    modelopt_format="nvfp4",
    weight_bits=4,
    activation="nvfp4",
    stored=(
        Stored(suffix="weight", dtype="U8", shape=lambda n, k: (n, k // 2)),
        Stored(suffix="weight_scale", dtype="F8_E4M3", shape=lambda n, k: (n, k // 16), scale=True),
        Stored(suffix="weight_scale_2", dtype="F32", shape=scalar, scale=True),
        Stored(suffix="input_scale", dtype="F32", shape=scalar, scale=True),
    ),
    group_size=16,
    in_multiple=16,
    equal_in_fused=("weight_scale_2", "input_scale"),
    learned_scales=True,
)
