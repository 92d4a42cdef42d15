"""TensorRT-LLM 1.1 (December 2025): gpt-oss, B300 (SM103), and NVFP4 experts by CuTe DSL."""

from __future__ import annotations

from toolchain.targets.architectures import ALL_SMS, B200, B300, BLACKWELL, HOPPER
from toolchain.targets.known_bad import KnownBad
from toolchain.targets.line import Line
from toolchain.targets.line_1_0 import LINE_1_0, UNLISTED
from toolchain.targets.rows import also_on, dense, moe
from toolchain.targets.sources import (
    CREATE_MOE,
    GPT_OSS_1_2,
    LLM_ARGS_1_1,
    MATRIX_1_1,
    MOE_GUIDE,
    NOTES_1_1,
    issue,
    pull,
)

WEIGHTS_ONLY = "activations stay in BF16; weights are expanded in the kernel: saves memory, not arithmetic"
GPT_OSS_ONLY = "documented for gpt-oss only"
_W4A8 = "the hardware matrix does not list it"

# Release notes of 1.1: "support for B300/GB300"; 1.1.0rc4: kernels of trtllm-gen for SM103 (7570).
_SM103 = also_on(
    LINE_1_0.rows, like=B200, sms=(B300,), source=f"{NOTES_1_1}: B300; {MATRIX_1_1}; {pull(7570)}"
)

_MOE = (
    moe(
        "TRITON",
        "mxfp4",
        HOPPER,
        f"{pull(6645)}; {pull(7101)}: TRITON on H100 and H200; {GPT_OSS_1_2}",
        preferred=True,
        state="limited",
        note=f"{WEIGHTS_ONLY}; {GPT_OSS_ONLY}",
    ),
    moe(
        "TRTLLM",
        "mxfp4",
        BLACKWELL,
        f"{GPT_OSS_1_2}; {CREATE_MOE}",
        preferred=True,
        state="limited",
        note=f"activations in MXFP8; {GPT_OSS_ONLY}",
    ),
    moe(
        "CUTLASS",
        "mxfp4",
        BLACKWELL,
        f"{GPT_OSS_1_2}; {MOE_GUIDE}",
        state="limited",
        note=f"activations in MXFP8; {GPT_OSS_ONLY}; TRTLLM is faster since 1.2",
    ),
    moe(
        "TRTLLM",
        "w4a8_nvfp4_fp8",
        BLACKWELL,
        f"{pull(6809)}, in 1.1.0rc4; {MOE_GUIDE}",
        preferred=True,
        state="limited",
        note=_W4A8,
    ),
    moe(
        "CUTEDSL", "nvfp4", (B200,), f"{NOTES_1_1}: CuteDSL NVFP4 grouped GEMM; {pull(8880)}: B200 and GB200"
    ),
    moe(
        "CUTEDSL",
        "fp8_block",
        BLACKWELL,
        f"{pull(6616)}; {MOE_GUIDE}",
        state="no",
        note="its FP8 block path ends in a reference loop over experts; use TRTLLM or DEEPGEMM",
    ),
    moe(
        "CUTLASS",
        "int8_wo",
        ALL_SMS,
        f"{pull(6629)} (August 2025); {MOE_GUIDE}: SM80 and later",
        preferred=True,
        state="limited",
        note=f"{WEIGHTS_ONLY}; {UNLISTED}",
    ),
)

LINE_1_1 = Line(
    name="1.1",
    versions=("1.1.0",),
    before=LINE_1_0,
    rows=(
        *_MOE,
        dense("w4a8_nvfp4_fp8", BLACKWELL, f"{pull(6809)}, in 1.1.0rc4", state="limited", note=_W4A8),
        *_SM103,
    ),
    backends=(*LINE_1_0.backends, "TRITON"),
    backends_source=f"{LLM_ARGS_1_1}; the default is CUTLASS",
    eplb=LINE_1_0.eplb,
    eplb_source=LINE_1_0.eplb_source,
    known_bad=(
        KnownBad(
            what="the TRTLLM MoE backend does not take Qwen3 models with more than 128 experts, such as "
            "Qwen3-Coder-480B-A35B; mended by pull request 7761",
            link=issue(9021),
            instead="moe_config.backend DEEPGEMM, or TensorRT-LLM >= 1.2.0",
            until="1.2.0",
            families=("qwen3_moe",),
            model="moe",
            backends=("TRTLLM",),
            more_experts_than=128,
        ),
    ),
)
