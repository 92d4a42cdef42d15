"""NVFP4 weights in blocks of 32, FP8 activations (W4A8).

``weight_scale_2`` is amax / 448 and not amax / (6 * 448): the kernel expands weights to E4M3, whose range ends at 448.
"""

from __future__ import annotations

from toolchain.formats.base import Format, Stored, scalar

W4A8_NVFP4_FP8 = Format(
    name="w4a8_nvfp4_fp8",
    title="NVFP4 E2M1 weights in blocks of 32, per-tensor FP8 activations",
    quant_algo="W4A8_NVFP4_FP8",
    modelopt_preset="W4A8_NVFP4_FP8_CFG",
    modelopt_format="w4a8_nvfp4_fp8",
    weight_bits=4,
    activation="fp8",
    stored=(
        Stored(suffix="weight", dtype="U8", shape=lambda n, k: (n, k // 2)),
        Stored(suffix="weight_scale", dtype="F8_E4M3", shape=lambda n, k: (n, k // 32), scale=True),
        Stored(suffix="weight_scale_2", dtype="F32", shape=scalar, scale=True),
        Stored(suffix="input_scale", dtype="F32", shape=scalar, scale=True),
    ),
    group_size=32,
    in_multiple=32,
    equal_in_fused=("weight_scale_2", "input_scale"),
    learned_scales=True,
)
