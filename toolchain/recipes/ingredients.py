"""Every ingredient that a recipe may name."""

from __future__ import annotations

from toolchain.recipes.base import Ingredient

NVFP4_WEIGHTS = ("nvfp4", "w4a16_nvfp4", "w4a8_nvfp4_fp8")
INT4_WEIGHTS = ("int4_awq", "int4_gptq", "w4a8_awq")
MX_WEIGHTS = ("mxfp4",)
EIGHT_BITS = ("fp8", "fp8_block", "fp8_per_channel_per_token", "mxfp8", "int8_sq", "int8_wo")

INGREDIENTS: tuple[Ingredient, ...] = (
    Ingredient(
        name="awq",
        title="activation-aware channel scales, folded into the layer before where one is",
        axis="transform",
        formats=INT4_WEIGHTS,
        source="AWQ, arXiv 2306.00978; ModelOpt awq_lite",
    ),
    Ingredient(
        name="smoothquant",
        title="move outliers from activations to weights, with a searched alpha",
        axis="transform",
        formats=("int8_sq",),
        source="SmoothQuant, arXiv 2211.10438",
    ),
    Ingredient(
        name="arrange",
        title="order and power of two of each channel between up and down, so that neighbours round well together",
        axis="order",
        # Not w4a8_nvfp4_fp8: its weights lie in blocks of 32, its inputs in none.
        formats=("nvfp4", "w4a16_nvfp4"),
        needs_moments=False,
    ),
    Ingredient(
        name="compensate",
        title="aim at the weights that do best on the inputs they will really get: rounded, behind quantized ones",
        axis="target",
        # Not int8_sq: SmoothQuant changes how inputs are rounded after this has looked at it.
        formats=tuple(
            name for name in (*INT4_WEIGHTS, *NVFP4_WEIGHTS, *MX_WEIGHTS, *EIGHT_BITS) if name != "int8_sq"
        ),
    ),
    Ingredient(
        name="mse",
        title="the block scale with the least squared error: all 126 E4M3 codes, or two exponents (MXFP4)",
        axis="scales",
        formats=(*NVFP4_WEIGHTS, *MX_WEIGHTS),
        needs_data=False,
        source="ModelOpt mse with fp8_scale_sweep",
    ),
    Ingredient(
        name="window",
        title="the same over 8 codes around amax/6: nearly the gain in less time",
        axis="scales",
        formats=NVFP4_WEIGHTS,
        needs_data=False,
    ),
    Ingredient(
        name="four_over_six",
        title="per block, the better of a largest code of 6 and of 4",
        axis="scales",
        formats=NVFP4_WEIGHTS,
        needs_data=False,
        source="Four Over Six, arXiv 2512.02010",
    ),
    Ingredient(
        name="local_hessian",
        title="the same 8 codes by output error: squared error weighted by the block's part of the Hessian",
        axis="scales",
        formats=(*NVFP4_WEIGHTS, *MX_WEIGHTS),
        source="ModelOpt local_hessian",
    ),
    Ingredient(
        name="clip",
        title="group scales from a clipped range, chosen by output error",
        axis="scales",
        formats=INT4_WEIGHTS,
        source="AWQ, arXiv 2306.00978; ModelOpt awq_clip",
    ),
    Ingredient(
        name="gptq",
        title="round column by column and let later columns make up for the error",
        axis="rounding",
        formats=(*INT4_WEIGHTS, *NVFP4_WEIGHTS, *MX_WEIGHTS, *EIGHT_BITS),
        source="GPTQ, arXiv 2210.17323",
    ),
    Ingredient(
        name="headroom",
        title="input scales with room for activations larger than calibration saw",
        axis="inputs",
        formats=("nvfp4",),
        source="ModelOpt nvfp4_act_headroom",
    ),
    Ingredient(
        name="pinned",
        title="input scales of 1: blocks are scaled as they come at run time, and no data is needed",
        axis="inputs",
        formats=("nvfp4",),
        needs_data=False,
        source="ModelOpt constant_amax 2688, recipe nvfp4_experts_only_input_scale1-kv_fp8_cast",
    ),
)
