"""NVFP4 weights only: E2M1, one E4M3 scale per 16 elements, one FP32 scale per tensor (W4A16)."""

from __future__ import annotations

from toolchain.formats.base import Format, Stored, scalar

W4A16_NVFP4 = Format(
    name="w4a16_nvfp4",
    title="NVFP4 E2M1, blocks of 16 with E4M3 scales, weights only",
    quant_algo="W4A16_NVFP4",
    modelopt_preset="W4A16_NVFP4_CFG",
    modelopt_format="w4a16_nvfp4",
    weight_bits=4,
    activation="bf16",
    stored=(
        Stored(suffix="weight", dtype="U8", shape=lambda n, k: (n, k // 2)),
        Stored(suffix="weight_scale", dtype="F8_E4M3", shape=lambda n, k: (n, k // 16), scale=True),
        Stored(suffix="weight_scale_2", dtype="F32", shape=scalar, scale=True),
    ),
    group_size=16,
    in_multiple=16,
    equal_in_fused=("weight_scale_2",),
    learned_scales=True,
)
