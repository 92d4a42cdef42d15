"""TensorRT-LLM's PyTorch backend: the LLM API, trtllm-serve and Triton's llmapi.

Tables from its ``docs/source/features/quantization.md`` (hardware matrix) and
``tensorrt_llm/_torch/modules/fused_moe/MOE_DEVELOPER_GUIDE.md`` (backends per format and SM). Where the two
differ for mixtures of experts, the second decides, because it lists the kernels.
"""

from __future__ import annotations

from typing import Any

from toolchain.core.errors import UsageError
from toolchain.families.base import Family
from toolchain.formats.base import Format
from toolchain.targets.base import Mixed, Model, Row, Target

HARDWARE = "TensorRT-LLM docs/source/features/quantization.md"
LINEAR = "TensorRT-LLM _torch/modules/linear.py"
MOE_GUIDE = "TensorRT-LLM fused_moe/MOE_DEVELOPER_GUIDE.md"

ADA, HOPPER, BLACKWELL, BLACKWELL_RTX = (89,), (90,), (100, 103), (120, 121)
AMPERE = (80, 86, 87)
_ALL = (*AMPERE, *ADA, *HOPPER, *BLACKWELL, *BLACKWELL_RTX)

MAIN = "1.3.0rc20"
"""First release that the tables take for what TensorRT-LLM's main documents. The MoE guide and the current hardware
matrix are of mid and late 2026; which release brought a kernel is rarely written down."""

_MARLIN = (
    "runs as W4A16 on Marlin kernels: saves memory, computes in BF16. Opt in with moe_config.backend MARLIN "
    "and nvfp4_gemm_config.allowed_backends [marlin]"
)
_AWQ_BLACKWELL = (
    "which release brought AWQ kernels to SM100 is not documented: the matrix of 1.1 lacks them, "
    "today's has them"
)
_UNDATED = "documented for TensorRT-LLM's main; which release brought it is not"
_WEIGHTS_ONLY = "activations stay in BF16; weights are expanded in the kernel: saves memory, not arithmetic"
_MXFP4 = f"{_WEIGHTS_ONLY}; documented for gpt-oss only"
_UNLISTED = "there is a kernel for it in the sources, but the hardware matrix does not list it"
_BLOCK_BLACKWELL = (
    "SM100 turns the FP32 block scales into powers of two (MXFP8 recipe): not bit for bit what was verified"
)
_HEAD = (
    "a quantized lm_head is read from MIXED_PRECISION checkpoints by today's main; 1.2 ignores its quant config, and "
    "which release began is not documented"
)


def _rows(formats: str, sms: tuple[int, ...], model: Model, *, source: str = "", **rest: Any) -> Row:
    return Row(
        formats=tuple(formats.split()),
        sms=sms,
        models=(model,),
        source=source or (MOE_GUIDE if model == "moe" else HARDWARE),
        **rest,
    )


_DENSE: tuple[Row, ...] = (
    _rows("fp8", (*ADA, *HOPPER, *BLACKWELL, *BLACKWELL_RTX), "dense"),
    _rows("fp8_block", HOPPER, "dense"),
    _rows("fp8_block", BLACKWELL, "dense", state="limited", note=_BLOCK_BLACKWELL),
    _rows("fp8_per_channel_per_token", HOPPER, "dense"),
    _rows("nvfp4", (*BLACKWELL, *BLACKWELL_RTX), "dense"),
    _rows(
        "w4a16_nvfp4",
        (*HOPPER, *BLACKWELL, *BLACKWELL_RTX),
        "dense",
        since=MAIN,
        state="limited",
        note=f"{_WEIGHTS_ONLY}; {_UNDATED}",
    ),
    _rows("w4a8_nvfp4_fp8", BLACKWELL, "dense", since=MAIN, state="limited", note=_UNDATED),
    _rows("mxfp8", BLACKWELL, "dense", since=MAIN, state="limited", note=_UNDATED),
    _rows("int4_awq int4_gptq", (*AMPERE, *ADA, *HOPPER), "dense"),
    _rows("int4_awq int4_gptq", BLACKWELL, "dense", since="1.3.0rc22"),
    _rows("int4_awq int4_gptq", BLACKWELL, "dense", since="1.2.0", state="limited", note=_AWQ_BLACKWELL),
    _rows("w4a8_awq", (*ADA, *HOPPER), "dense"),
    _rows("w4a8_awq", BLACKWELL, "dense", since="1.3.0rc22"),
    _rows("w4a8_awq", BLACKWELL, "dense", since="1.2.0", state="limited", note=_AWQ_BLACKWELL),
    _rows(
        "int8_wo",
        (*AMPERE, *ADA, *HOPPER),
        "dense",
        since="1.2.0",
        state="limited",
        note=_UNLISTED,
        source=LINEAR,
    ),
)
_MOE: tuple[Row, ...] = (
    _rows("fp8", (*ADA, *HOPPER, *BLACKWELL, *BLACKWELL_RTX), "moe", backend="CUTLASS"),
    _rows("fp8_block", HOPPER, "moe", backend="CUTLASS"),
    _rows("fp8_block", (120,), "moe", backend="CUTLASS", since=MAIN, state="limited", note=_UNDATED),
    _rows("fp8_block", BLACKWELL, "moe", backend="TRTLLM", state="limited", note=_BLOCK_BLACKWELL),
    _rows("nvfp4", (*BLACKWELL, *BLACKWELL_RTX), "moe", backend="CUTLASS"),
    _rows("w4a16_nvfp4", HOPPER, "moe", since=MAIN, backend="MARLIN", state="limited", note=_WEIGHTS_ONLY),
    _rows(
        "w4a16_nvfp4",
        BLACKWELL_RTX,
        "moe",
        since=MAIN,
        backend="CUTEDSL",
        state="limited",
        note=_WEIGHTS_ONLY,
    ),
    _rows(
        "w4a16_nvfp4",
        (*AMPERE, *ADA, *BLACKWELL),
        "moe",
        since=MAIN,
        backend="CUTLASS",
        state="limited",
        note="weights are expanded to BF16 in memory at every step: saves memory, costs time",
    ),
    _rows("w4a8_nvfp4_fp8", BLACKWELL, "moe", since=MAIN, backend="TRTLLM", state="limited", note=_UNDATED),
    _rows("mxfp4", HOPPER, "moe", backend="TRITON", since="1.1.0", state="limited", note=_MXFP4),
    _rows("mxfp4", BLACKWELL, "moe", backend="TRTLLM", since="1.1.0", state="limited", note=_MXFP4),
    _rows("mxfp8", BLACKWELL, "moe", since=MAIN, backend="CUTLASS", state="limited", note=_UNDATED),
    _rows("w4a8_awq", (*ADA, *HOPPER), "moe", backend="CUTLASS"),
    _rows(
        "int8_wo",
        _ALL,
        "moe",
        backend="CUTLASS",
        since=MAIN,
        state="limited",
        note=f"{_WEIGHTS_ONLY}; {_UNDATED}",
    ),
)
_MARLIN_ROWS: tuple[Row, ...] = (
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
    rows=(*_DENSE, *_MOE, *_MARLIN_ROWS),
    kv_rows=(
        # The constant scale of fp8_cast is what runtimes assume for an FP8 cache without stored scales.
        Row(formats=("fp8", "fp8_cast"), sms=_ALL, source=HARDWARE),
        Row(formats=("nvfp4",), sms=BLACKWELL, since=MAIN, state="limited", note=_UNDATED, source=HARDWARE),
    ),
    head_rows=(
        Row(
            formats=("fp8", "nvfp4", "w4a16_nvfp4"),
            sms=(*ADA, *HOPPER, *BLACKWELL, *BLACKWELL_RTX),
            since="1.3.0rc22",
            state="limited",
            note=_HEAD,
            source="TensorRT-LLM _torch/models/modeling_utils.py",
        ),
    ),
    mixed=Mixed(
        families=("deepseek",),
        broken_until="1.3.0rc20",
        reason="its loader gives the experts the config of the whole checkpoint, which says MIXED_PRECISION: it "
        "allocates them in BF16 and fails, or refuses the config as ambiguous",
        source="TensorRT-LLM pull request 15485; modeling_deepseekv3.py asks per layer",
    ),
)

REASONS: dict[tuple[str, str], str] = {
    ("int4_awq", "moe"): "no MoE backend of TensorRT-LLM has W4A16_AWQ kernels",
    ("int4_gptq", "moe"): "no MoE backend of TensorRT-LLM has kernels for INT4 weights with BF16 activations",
    ("fp8_per_channel_per_token", "moe"): "no MoE backend of TensorRT-LLM has row-wise FP8 kernels",
    ("int8_sq", "moe"): "no MoE backend of TensorRT-LLM has SmoothQuant kernels",
    ("int8_sq", "dense"): "SmoothQuant is not among the formats of TensorRT-LLM's PyTorch backend",
    ("mxfp4", "dense"): "TensorRT-LLM runs MXFP4 in the experts of a mixture only (gpt-oss)",
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
    if format.name in ("fp8_block", "mxfp4", "w4a16_nvfp4") and row.state == "limited":
        return row.backend, f"{row.backend} runs {format.quant_algo} experts on SM{sm}: {row.note}"
    if format.name == "nvfp4" and sm in BLACKWELL:
        return (
            "CUTLASS",
            "what AUTO resolves to for NVFP4 on SM100/103; TRTLLM and CUTEDSL have it too: benchmark them",
        )
    return (
        row.backend,
        f"{row.backend} has {format.quant_algo} kernels for SM{sm}; what AUTO resolves to, fixed",
    )
