"""TensorRT-LLM 1.2 (March 2026): GLM-4.5, NVFP4 KV cache, AUTO as default of ``moe_config.backend``, DGX Spark in beta.

The last stable line with trtllm-build.
"""

from __future__ import annotations

from toolchain.targets.architectures import BLACKWELL, BLACKWELL_RTX, HOPPER, RTX, SPARK
from toolchain.targets.known_bad import KnownBad
from toolchain.targets.line import Line
from toolchain.targets.line_1_1 import GPT_OSS_ONLY, LINE_1_1, WEIGHTS_ONLY
from toolchain.targets.rows import UNVERIFIED, Row, also_on, dense, moe
from toolchain.targets.sources import (
    GPT_OSS_1_2,
    LLM_ARGS_1_2,
    MATRIX_1_2,
    MATRIX_1_3,
    MOE_GUIDE,
    NOTES_1_2,
    discussion,
    pull_link,
)

_SPARK = "DGX Spark is in beta: one node, and the models that the release notes name"
_MXFP4_RTX = (
    f"{GPT_OSS_ONLY}; {UNVERIFIED}: the matrix lists MXFP4 on SM120 and AUTO falls back to CUTLASS there, the table of "
    "kernels names SM120 in one copy and leaves it out in a later one"
)
NVFP4_KV = "only with FP8 weights and activations, and documented for Llama 2, Llama 3 and Qwen3 only"

# Release notes of 1.0 name SM121, those of 1.2 "DGX Spark (beta)"; the hardware matrix has no row for it.
_SM121 = tuple(
    row
    for row in also_on(
        LINE_1_1.all_rows(), like=RTX, sms=(SPARK,), source=NOTES_1_2, state="limited", note=_SPARK
    )
    if row.backend != "VANILLA"
)

LINE_1_2 = Line(
    name="1.2",
    versions=("1.2.0", "1.2.1"),
    before=LINE_1_1,
    rows=(
        # 1.1's matrix has no AWQ and GPTQ on SM100.
        dense("int4_awq int4_gptq w4a8_awq", BLACKWELL, MATRIX_1_2),
        moe(
            "CUTLASS",
            "mxfp4",
            HOPPER,
            f'{GPT_OSS_1_2}: "for Hopper, Triton is the faster"; {MOE_GUIDE}: W4A16_MXFP4 on SM90',
            state="limited",
            note=f"{WEIGHTS_ONLY}; {GPT_OSS_ONLY}; TRITON is faster",
        ),
        moe(
            "CUTLASS",
            "mxfp4",
            (RTX,),
            f"{MATRIX_1_2}; _torch/model_config.py resolve_moe_backend: CUTLASS for gpt-oss on SM120; {MOE_GUIDE}",
            preferred=True,
            state="limited",
            note=_MXFP4_RTX,
        ),
        *_SM121,
    ),
    kv_rows=(
        Row(
            formats=("nvfp4",),
            sms=BLACKWELL,
            state="limited",
            beside=("fp8",),
            note=NVFP4_KV,
            source=f"{MATRIX_1_2}; the same in {MATRIX_1_3}",
        ),
    ),
    backends=LINE_1_1.backends,
    backends_source=f"{LLM_ARGS_1_2}; the default is AUTO",
    eplb=("WIDEEP", "CUTLASS", "TRTLLM", "CUTEDSL", "DEEPGEMM"),
    eplb_source=f"{NOTES_1_2}: EPLB for trtllm-gen and CUTLASS, CuteDSL with large EP",
    known_bad=(
        KnownBad(
            what="grouped GEMMs of NVFP4 experts plan with the shared memory of B200: most tactics fail on SM121 and "
            "what is left is slow; mended with CUTLASS 4.4.2 (April 2026)",
            link=pull_link(12899),
            instead="TensorRT-LLM >= 1.3.0rc20",
            until="1.3.0rc20",
            sms=(SPARK,),
            formats=("nvfp4",),
            model="moe",
        ),
        KnownBad(
            what="reported with 1.3.0rc20: no MoE backend of SM120 and SM121 is both right and capable of expert "
            "parallelism (Kimi-K2 in NVFP4)",
            link=discussion(16360),
            instead="--ep 1: experts cut by --tp",
            sms=BLACKWELL_RTX,
            formats=("nvfp4",),
            model="moe",
            min_ep=2,
        ),
    ),
)
