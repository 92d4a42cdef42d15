"""TensorRT-LLM 1.3 (candidates, January to September 2026): Marlin, weight-only NVFP4, MXFP8, DenseGEMM.

There is no final 1.3.0. 1.3.0rc20 is the last with trtllm-build. Which candidate brought what is known from release
notes where they name it; else ``since`` is the first candidate after the pull request was merged.
"""

from __future__ import annotations

from toolchain.targets.architectures import ADA, AMPERE, B300, BLACKWELL, BLACKWELL_RTX, HOPPER, RTX
from toolchain.targets.known_bad_1_3 import KNOWN_BAD
from toolchain.targets.line import Line
from toolchain.targets.line_1_0 import REFERENCE_ONLY
from toolchain.targets.line_1_1 import WEIGHTS_ONLY
from toolchain.targets.line_1_2 import LINE_1_2
from toolchain.targets.rows import UNVERIFIED, Row, dense, moe
from toolchain.targets.sources import (
    CREATE_MOE,
    DEEPSEEK_1_3,
    LITERAL_1_3,
    MOE_GUIDE,
    notes,
    pull,
)

_MARLIN = (
    "runs as W4A16 on Marlin kernels: saves memory, computes in BF16. Opt in with moe_config.backend MARLIN "
    "and nvfp4_gemm_config.allowed_backends [marlin]"
)
_MARLIN_RC20 = f"{pull(13476)}, in {notes('1.3.0rc20')}"
_MARLIN_ADA = f"{pull(16749)}, merged after 2026-07-24 (rc22 is of 07-22); {MOE_GUIDE}: SM89 to SM99"
_W4A16 = f"{pull(15703)}: the algorithm, after {pull(15886)} found it missing on 2026-07-02"
_DEQUANT = "weights are expanded to BF16 in memory at every step: saves memory, costs time"
_B12X = "needs FlashInfer; not with expert parallelism or attention data parallelism"
_MXFP8 = "the hardware matrix does not list it"
_BLOCK_RTX = "experts only: dense layers have no FP8 block kernel on SM120 (issue 5581)"
_TRITON_FP8 = "for experts with gpt-oss's activation only"
_HEAD = (
    f"{UNVERIFIED}: a quantized lm_head is read from MIXED_PRECISION checkpoints by the main branch of mid 2026; 1.2 "
    "ignores its quant config, and which release began is not documented"
)
_UNDATED = f"{UNVERIFIED}: no document lists dense layers in it by GPU"

_DENSE = (
    dense("nvfp4", HOPPER, _MARLIN_RC20, since="1.3.0rc20", state="limited", backend="MARLIN", note=_MARLIN),
    dense("nvfp4", ADA, _MARLIN_ADA, since="1.3.0rc29", state="limited", backend="MARLIN", note=_MARLIN),
    dense(
        "w4a16_nvfp4",
        (*HOPPER, *BLACKWELL, *BLACKWELL_RTX),
        _W4A16,
        since="1.3.0rc22",
        state="limited",
        note=f"{WEIGHTS_ONLY}; {_UNDATED}",
    ),
    dense(
        "mxfp8",
        BLACKWELL,
        f"{pull(14962)}, in {notes('1.3.0rc20')}",
        since="1.3.0rc20",
        state="limited",
        note=_MXFP8,
    ),
)
_WEIGHTS_ONLY_NVFP4 = (
    moe(
        "MARLIN",
        "w4a16_nvfp4",
        HOPPER,
        f"{_W4A16}; {MOE_GUIDE}",
        since="1.3.0rc22",
        preferred=True,
        state="limited",
        note=WEIGHTS_ONLY,
    ),
    moe(
        "MARLIN",
        "w4a16_nvfp4",
        ADA,
        _MARLIN_ADA,
        since="1.3.0rc29",
        preferred=True,
        state="limited",
        note=WEIGHTS_ONLY,
    ),
    moe(
        "CUTEDSL",
        "w4a16_nvfp4",
        BLACKWELL_RTX,
        f"{pull(16511)} (merged in August 2026); {MOE_GUIDE}",
        since="1.3.0rc29",
        preferred=True,
        ep=False,
        attention_dp=False,
        state="limited",
        note=f"{WEIGHTS_ONLY}; {_B12X}",
    ),
    moe(
        "CUTLASS",
        "w4a16_nvfp4",
        (*AMPERE, *ADA, *HOPPER, *BLACKWELL, *BLACKWELL_RTX),
        f"{_W4A16}; {MOE_GUIDE}",
        since="1.3.0rc22",
        state="limited",
        note=_DEQUANT,
    ),
    moe(
        "VANILLA",
        "w4a16_nvfp4",
        (*HOPPER, *BLACKWELL, *BLACKWELL_RTX),
        MOE_GUIDE,
        since="1.3.0rc22",
        state="limited",
        note=REFERENCE_ONLY,
    ),
)
_NVFP4 = (
    moe(
        "MARLIN",
        "nvfp4",
        HOPPER,
        _MARLIN_RC20,
        since="1.3.0rc20",
        preferred=True,
        state="limited",
        note=_MARLIN,
    ),
    moe(
        "MARLIN", "nvfp4", ADA, _MARLIN_ADA, since="1.3.0rc29", preferred=True, state="limited", note=_MARLIN
    ),
    moe(
        "DENSEGEMM",
        "nvfp4",
        BLACKWELL,
        f"{pull(10479)}; {pull(13834)} documents it in May 2026; {MOE_GUIDE}",
        since="1.3.0rc20",
        state="limited",
        note="all experts as one dense matmul: for few tokens at a time (64 to 208 on DeepSeek-V3, tp=8)",
    ),
    moe(
        "CUTEDSL",
        "nvfp4",
        (B300,),
        f"{MOE_GUIDE}; {DEEPSEEK_1_3}: CUTEDSL for wide expert parallelism",
        since="1.3.0rc20",
    ),
    moe(
        "CUTEDSL",
        "nvfp4",
        BLACKWELL_RTX,
        f"{pull(13773)}, in {notes('1.3.0rc17')}; {MOE_GUIDE}",
        since="1.3.0rc17",
        ep=False,
        attention_dp=False,
        state="limited",
        note=_B12X,
    ),
)
_MEGA_MOE = (
    moe(
        "MEGAMOE_CUTEDSL",
        "nvfp4",
        BLACKWELL,
        f"{LITERAL_1_3}; {MOE_GUIDE}",
        since="1.3.0rc27",
        state="limited",
        note="communication inside of the kernel: needs CUDA 13's CUTLASS DSL and NVSHMEM",
    ),
    moe(
        "MEGAMOE_DEEPGEMM",
        "mxfp4",
        BLACKWELL,
        f"{pull(13384)}; {MOE_GUIDE}",
        state="no",
        note="for DeepSeek-V4: hidden_size % 512 == 0, and gpt-oss's activation is not among its kernels",
    ),
)
_FP8 = (
    moe(
        "CUTLASS",
        "fp8_block",
        (RTX,),
        f"{pull(11502)} (March 2026); {MOE_GUIDE}",
        since="1.3.0rc20",
        preferred=True,
        state="limited",
        note=_BLOCK_RTX,
    ),
    moe("TRITON", "fp8", HOPPER, MOE_GUIDE, since="1.3.0rc20", state="limited", note=_TRITON_FP8),
    moe(
        "CUTLASS",
        "mxfp8",
        BLACKWELL,
        f"{pull(14962)}, in {notes('1.3.0rc20')}; {MOE_GUIDE}",
        since="1.3.0rc20",
        preferred=True,
        state="limited",
        note=f"{_MXFP8}; sources of rc20 call the fused kernel a later step",
    ),
)

LINE_1_3 = Line(
    name="1.3",
    versions=("1.3.0rc20", "1.3.0rc22", "1.3.0rc29"),
    before=LINE_1_2,
    rows=(*_DENSE, *_NVFP4, *_WEIGHTS_ONLY_NVFP4, *_MEGA_MOE, *_FP8),
    head_rows=(
        Row(
            formats=("fp8", "nvfp4", "w4a16_nvfp4"),
            sms=(*ADA, *HOPPER, *BLACKWELL, *BLACKWELL_RTX),
            since="1.3.0rc22",
            state="limited",
            note=_HEAD,
            source="TensorRT-LLM tensorrt_llm/_torch/models/modeling_utils.py, main of mid 2026",
        ),
    ),
    backends=(
        *("CUTLASS", "CUTEDSL", "TRTLLM", "DEEPGEMM", "DENSEGEMM"),
        *("VANILLA", "TRITON", "MARLIN", "MEGAMOE_DEEPGEMM", "MEGAMOE_CUTEDSL"),
    ),
    backends_source=f"{LITERAL_1_3}: WIDEEP is gone; rc20 still has it and lacks MEGAMOE_CUTEDSL",
    eplb=("CUTLASS", "TRTLLM", "CUTEDSL", "DEEPGEMM", "DENSEGEMM"),
    eplb_source=f"{CREATE_MOE} and younger copies; {MOE_GUIDE}: MARLIN has none",
    known_bad=KNOWN_BAD,
)
