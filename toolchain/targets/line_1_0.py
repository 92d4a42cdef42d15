"""TensorRT-LLM 1.0 (September 2025): the first line whose default is the PyTorch backend."""

from __future__ import annotations

from toolchain.targets.architectures import ADA, ALL_SMS, AMPERE, B200, BLACKWELL, BLACKWELL_RTX, HOPPER, RTX
from toolchain.targets.known_bad import KnownBad
from toolchain.targets.line import Line
from toolchain.targets.rows import Row, dense, moe
from toolchain.targets.sources import (
    CREATE_MOE,
    DEEPSEEK_1_0,
    DEEPSEEK_1_2,
    LINEAR,
    LLM_ARGS_1_0,
    MATRIX_1_0,
    MOE_GUIDE,
    NOTES_1_0,
    NOTES_PAGE,
    issue,
    notes,
    pull,
)

BLOCK_BLACKWELL = (
    "SM100 turns the FP32 block scales into powers of two (MXFP8 recipe): not bit for bit what was verified"
)
UNLISTED = "there is a kernel for it in the sources, but the hardware matrix does not list it"
REFERENCE_ONLY = "reference implementation, one matmul per expert: for comparing numbers, never for serving"
WIDE_EP = (
    "for expert parallelism over more than 8 ranks, with attention data parallelism; gone in the 1.3 line"
)
_HOPPER_ONLY = "its FP8 block kernel stops with `fp8 blockscale gemm only support Hopper`"

_DENSE = (
    dense("fp8", (*ADA, *HOPPER, B200, RTX), MATRIX_1_0),
    dense("fp8_block", HOPPER, MATRIX_1_0),
    dense("fp8_block", (B200,), MATRIX_1_0, state="limited", note=BLOCK_BLACKWELL),
    dense("fp8_per_channel_per_token", HOPPER, f"{MATRIX_1_0}; {NOTES_1_0}: row-wise FP8 in the torch flow"),
    dense("nvfp4", (B200, RTX), MATRIX_1_0),
    dense("int4_awq int4_gptq", (*AMPERE, *ADA, *HOPPER), MATRIX_1_0),
    dense("w4a8_awq", (*ADA, *HOPPER), MATRIX_1_0),
    dense(
        "int8_wo",
        (*AMPERE, *ADA, *HOPPER),
        f"{NOTES_1_0}: weight-only quantization in the PyTorch workflow; {LINEAR}",
        state="limited",
        note=UNLISTED,
    ),
)
_MOE = (
    moe(
        "CUTLASS",
        "fp8",
        (*ADA, *HOPPER, B200, RTX),
        f"{MATRIX_1_0}; {MOE_GUIDE}: SM89 and later",
        preferred=True,
    ),
    moe("CUTLASS", "fp8_block", HOPPER, f"{MATRIX_1_0}; {MOE_GUIDE}", preferred=True),
    moe(
        "CUTLASS",
        "fp8_block",
        BLACKWELL,
        f"TensorRT-LLM issue 5064 ({issue(5064)})",
        state="no",
        note=_HOPPER_ONLY,
    ),
    moe(
        "TRTLLM",
        "fp8_block",
        (B200,),
        f"{CREATE_MOE}: TRTLLM takes fp8_block_scales; {NOTES_1_0}: DeepSeek-R1 FP8 on Blackwell",
        state="limited",
        note=BLOCK_BLACKWELL,
    ),
    moe(
        "DEEPGEMM",
        "fp8_block",
        (B200,),
        f"{DEEPSEEK_1_0}: the backend for FP8; {pull(7524)}: that of the test on SM100; {MOE_GUIDE}",
        preferred=True,
        state="limited",
        note=BLOCK_BLACKWELL,
    ),
    moe(
        "CUTLASS", "nvfp4", (B200, RTX), f"{MATRIX_1_0}; {pull(4624)} for SM120; {MOE_GUIDE}", preferred=True
    ),
    moe("TRTLLM", "nvfp4", (B200,), f"{pull(3387)}; {NOTES_1_0}: attention_dp for TRTLLM MoE"),
    moe(
        "CUTLASS",
        "w4a8_awq",
        (*ADA, *HOPPER),
        f"{NOTES_1_0}: w4a8 MoE; {MOE_GUIDE}: SM89 and SM90 only",
        preferred=True,
    ),
    moe("WIDEEP", "fp8_block", HOPPER, f"{MOE_GUIDE}, as history", state="limited", note=WIDE_EP),
    moe(
        "WIDEEP", "nvfp4", (B200,), f"{MOE_GUIDE}, as history; {DEEPSEEK_1_2}", state="limited", note=WIDE_EP
    ),
    moe("VANILLA", "fp8", (*ADA, *HOPPER, B200, RTX), MOE_GUIDE, state="limited", note=REFERENCE_ONLY),
    moe("VANILLA", "fp8_block", (*HOPPER, B200), MOE_GUIDE, state="limited", note=REFERENCE_ONLY),
    moe("VANILLA", "nvfp4", (B200, RTX), MOE_GUIDE, state="limited", note=REFERENCE_ONLY),
)

LINE_1_0 = Line(
    name="1.0",
    versions=("1.0.0",),
    rows=(*_DENSE, *_MOE),
    # The constant scale of fp8_cast is what runtimes assume for an FP8 cache without stored scales.
    kv_rows=(Row(formats=("fp8", "fp8_cast"), sms=ALL_SMS, source=MATRIX_1_0),),
    backends=("CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA"),
    backends_source=LLM_ARGS_1_0,
    eplb=("WIDEEP",),
    eplb_source=f"{CREATE_MOE}, older copies: asserts WideEPMoE",
    known_bad=(
        KnownBad(
            what="gpt-oss is not among the models of TensorRT-LLM 1.0",
            link=notes("1.1.0rc0"),
            instead="TensorRT-LLM >= 1.1.0",
            until="1.1.0rc0",
            families=("gpt_oss",),
            severity="error",
        ),
        KnownBad(
            what="GLM-4.5 (Glm4MoeForCausalLM) is not among the models of TensorRT-LLM before 1.2",
            link=notes("1.2.0rc3"),
            instead="TensorRT-LLM >= 1.2.0",
            until="1.2.0rc3",
            families=("glm4_moe",),
            severity="error",
        ),
        KnownBad(
            what="accuracy problems of the CUTLASS MoE integration on Blackwell, mended in 1.1",
            link=NOTES_PAGE,
            instead="TensorRT-LLM >= 1.1.0",
            until="1.1.0",
            sms=(*BLACKWELL, *BLACKWELL_RTX),
            model="moe",
            backends=("CUTLASS",),
        ),
        KnownBad(
            what="the W4A8 MoE kernels have faults on Hopper, mended in 1.1",
            link=NOTES_PAGE,
            instead="TensorRT-LLM >= 1.1.0, or fp8",
            until="1.1.0",
            sms=HOPPER,
            formats=("w4a8_awq",),
            model="moe",
        ),
        KnownBad(
            what="Llama 4 in NVFP4 generates wrongly, mended in 1.1",
            link=NOTES_PAGE,
            instead="TensorRT-LLM >= 1.1.0, or fp8",
            until="1.1.0",
            formats=("nvfp4",),
            families=("llama4",),
        ),
    ),
)
