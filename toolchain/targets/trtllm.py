"""TensorRT-LLM's PyTorch backend: the LLM API, trtllm-serve and Triton's llmapi.

Tables from its ``docs/source/features/quantization.md`` (hardware matrix) and
``tensorrt_llm/_torch/modules/fused_moe/MOE_DEVELOPER_GUIDE.md`` (backends per format and SM). Where the two
differ for mixtures of experts, the second decides, because it lists the kernels.
"""

from __future__ import annotations

from toolchain.core.errors import UsageError
from toolchain.families.base import Family
from toolchain.formats.base import Format
from toolchain.targets.base import Row, Target

HARDWARE = "TensorRT-LLM docs/source/features/quantization.md"
MOE_GUIDE = "TensorRT-LLM fused_moe/MOE_DEVELOPER_GUIDE.md"

ADA, HOPPER, BLACKWELL, BLACKWELL_RTX = (89,), (90,), (100, 103), (120, 121)
AMPERE = (80, 86, 87)

_MARLIN = (
    "runs as W4A16 on Marlin kernels: saves memory, computes in BF16. Opt in with moe_config.backend MARLIN "
    "and nvfp4_gemm_config.allowed_backends [marlin]"
)
_AWQ_BLACKWELL = (
    "which release brought AWQ kernels to SM100 is not documented: the matrix of 1.1 lacks them, "
    "today's has them"
)

TRTLLM = Target(
    name="trtllm",
    title="TensorRT-LLM, PyTorch backend (LLM API, trtllm-serve, Triton llmapi)",
    default_version="1.2.1",
    versions=(
        "1.0.0",
        "1.1.0",
        "1.2.0",
        "1.2.1",
        "1.3.0rc20",
        "1.3.0rc22",
        "1.3.0rc29",
        "1.4.0rc0",
        "1.4.0rc1",
    ),
    rows=(
        Row(
            formats=("fp8",),
            sms=(*ADA, *HOPPER, *BLACKWELL, *BLACKWELL_RTX),
            models=("dense",),
            source=HARDWARE,
        ),
        Row(
            formats=("fp8",),
            sms=(*ADA, *HOPPER, *BLACKWELL, *BLACKWELL_RTX),
            models=("moe",),
            backend="CUTLASS",
            source=MOE_GUIDE,
        ),
        Row(formats=("nvfp4",), sms=(*BLACKWELL, *BLACKWELL_RTX), models=("dense",), source=HARDWARE),
        Row(
            formats=("nvfp4",),
            sms=(*BLACKWELL, *BLACKWELL_RTX),
            models=("moe",),
            backend="CUTLASS",
            source=MOE_GUIDE,
        ),
        Row(
            formats=("nvfp4",),
            sms=HOPPER,
            since="1.3.0rc20",
            state="limited",
            backend="MARLIN",
            note=_MARLIN,
            source="TensorRT-LLM pull request 13476",
        ),
        Row(
            formats=("nvfp4",),
            sms=ADA,
            # Its first release is not recorded; the start of the 1.4 line is a cautious guess.
            since="1.4.0rc0",
            state="limited",
            backend="MARLIN",
            note=_MARLIN,
            source="TensorRT-LLM pull request 16749",
        ),
        Row(formats=("int4_awq",), sms=(*AMPERE, *ADA, *HOPPER), models=("dense",), source=HARDWARE),
        Row(formats=("int4_awq",), sms=BLACKWELL, models=("dense",), since="1.3.0rc22", source=HARDWARE),
        Row(
            formats=("int4_awq",),
            sms=BLACKWELL,
            models=("dense",),
            since="1.2.0",
            state="limited",
            note=_AWQ_BLACKWELL,
            source=HARDWARE,
        ),
    ),
    kv_rows=(
        Row(formats=("fp8",), sms=(*AMPERE, *ADA, *HOPPER, *BLACKWELL, *BLACKWELL_RTX), source=HARDWARE),
    ),
)

REASONS: dict[tuple[str, str], str] = {
    ("int4_awq", "moe"): "no MoE backend of TensorRT-LLM has W4A16_AWQ kernels",
}
"""(format, model) -> why no row exists, where more is missing than a kernel for one SM."""


def moe_backend(version: str, sm: int, format: Format, family: Family) -> tuple[str, str]:
    """(``moe_config.backend``, reason) to write into the engine arguments of a mixture-of-experts model.

    Always explicit: AUTO is a preference that may resolve differently in the next release. Raises UsageError
    TC-120 when no backend has the format on this SM.
    """
    row = TRTLLM.find(format_name=format.name, sm=sm, model="moe", version=version)
    if row is None:
        raise UsageError(
            f"no MoE backend of TensorRT-LLM {version} runs {format.name} on SM{sm} ({family.name})",
            hint="`toolchain support` lists what works",
            code="TC-120",
        )
    if row.backend == "MARLIN":
        return "MARLIN", f"the only backend with {format.name} on SM{sm}; W4A16 (from {row.since})"
    if format.name == "nvfp4" and sm in BLACKWELL:
        return (
            "CUTLASS",
            "what AUTO resolves to for NVFP4 on SM100/103; TRTLLM and CUTEDSL have it too: benchmark them",
        )
    return (
        row.backend,
        f"{row.backend} has {format.quant_algo} kernels for SM{sm}; what AUTO resolves to, fixed",
    )
