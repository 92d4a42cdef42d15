"""TensorRT engines by trtllm-build: deprecated upstream, last in 1.3.0rc20.

Tables from TensorRT-LLM's ``docs/source/features/quantization.md`` (hardware matrix) and its package
``tensorrt_llm``: ``models/__init__.py`` (``MODEL_MAP``), ``layers/moe.py`` (what the MoE plugin takes) and
``models/modeling_utils.py`` (``preprocess_perlayer_weights``: what becomes of a checkpoint's tensors).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from toolchain.targets.base import Row, Target
from toolchain.targets.sources import issue
from toolchain.targets.trtllm import ADA, AMPERE, BLACKWELL, HARDWARE, HOPPER

LAST = "1.3.0rc21"
"""First release without the TensorRT backend (release notes of v1.3.0rc20: "last one supporting" it)."""
MOE_PLUGIN = "TensorRT-LLM tensorrt_llm/layers/moe.py"
_ONE_INPUT_SCALE = (
    "its MoE plugin takes one input scale for all experts of a layer: the largest; experts with a smaller one are "
    "computed under it"
)


@dataclass(frozen=True, kw_only=True)
class LegacyModel:
    """A model class of ``MODEL_MAP`` whose checkpoint is written here."""

    config: Literal["llama", "qwen"]
    """Which ``PretrainedConfig`` it has: ``models/llama/config.py`` or ``models/qwen/config.py``."""
    qwen_type: str = ""
    """``qwen_type`` of that config; empty for Llama's."""
    moe_parent: str = ""
    """Checkpoint name, within a layer, of what holds router and experts; empty for a dense model."""
    qk_norm: bool = False
    """Whether attention has norms of its own for queries and keys."""


LEGACY_MODELS: dict[str, LegacyModel] = {
    "LlamaForCausalLM": LegacyModel(config="llama"),
    "MistralForCausalLM": LegacyModel(config="llama"),
    "MixtralForCausalLM": LegacyModel(config="llama", moe_parent="block_sparse_moe"),
    "Qwen2ForCausalLM": LegacyModel(config="qwen", qwen_type="qwen2"),
    "Qwen3ForCausalLM": LegacyModel(config="qwen", qwen_type="qwen3", qk_norm=True),
    "Qwen2MoeForCausalLM": LegacyModel(config="qwen", qwen_type="qwen2_moe", moe_parent="mlp"),
    "Qwen3MoeForCausalLM": LegacyModel(config="qwen", qwen_type="qwen3_moe", moe_parent="mlp", qk_norm=True),
}
"""``architectures[0]`` -> its class. Source: ``MODEL_MAP`` in ``tensorrt_llm/models/__init__.py`` (1.0 to 1.2)."""

_REFUSED: dict[str, str] = {
    "DeepseekV2ForCausalLM": "its TensorRT model holds products of MLA projections in BF16 (fused_q_proj, "
    "models/deepseek_v2/convert.py), for which there is no quantized layout",
    "DeepseekV3ForCausalLM": "MODEL_MAP of tensorrt_llm/models/__init__.py has no TensorRT model class for it",
}

SPARSE_WEIGHTS = (
    "TensorRT-LLM tensorrt_llm/builder.py@008b2b8: --weight_sparsity sets TensorRT's SPARSE_WEIGHTS"
)
_PLUGIN = "run in a plugin with a dense kernel of its own, which TensorRT's choice of kernels does not reach"
SPARSE: tuple[Row, ...] = (
    # Where plugins compute, nothing is skipped: issue 1731 measured it for weight-only INT4, Model-Optimizer's issues
    # 603 and 1974 for gemm_plugin. The others are the same by construction.
    Row(
        formats=("fp8", "int8_sq"),
        sms=(*AMPERE, *ADA, *HOPPER, *BLACKWELL),
        models=("moe",),
        until=LAST,
        state="no",
        note=f"they {_PLUGIN}",
        source=MOE_PLUGIN,
    ),
    Row(
        formats=("int4_awq", "int4_gptq", "w4a8_awq"),
        sms=(*AMPERE, *ADA, *HOPPER, *BLACKWELL),
        until=LAST,
        state="no",
        note=f"they {_PLUGIN}",
        source=issue(1731),
    ),
    Row(
        formats=("nvfp4",),
        sms=BLACKWELL,
        until=LAST,
        state="no",
        note=f"they {_PLUGIN}, and tensor cores skip pairs of four-bit numbers (4:8), not single ones",
        source="TensorRT-LLM tensorrt_llm/quantization/layers.py (FP4Linear); PTX ISA, mma.sp for e2m1",
    ),
    Row(
        formats=("fp8",), sms=HOPPER, models=("dense",), until=LAST, source=f"{issue(1913)}; {SPARSE_WEIGHTS}"
    ),
    Row(
        formats=("fp8",),
        sms=ADA,
        models=("dense",),
        until=LAST,
        state="no",
        note="TensorRT's sparse FP8 kernels are slower than its dense ones there, so it does not choose them",
        source=issue(1913),
    ),
    Row(
        formats=("fp8",),
        sms=BLACKWELL,
        models=("dense",),
        until=LAST,
        state="limited",
        note="unverified: no report of sparse FP8 kernels being chosen there is known",
        source=SPARSE_WEIGHTS,
    ),
    Row(
        formats=("int8_sq",),
        sms=(*AMPERE, *ADA, *HOPPER),
        models=("dense",),
        until=LAST,
        state="limited",
        note="unverified: TensorRT has sparse INT8 kernels from SM80 on, and W8A8_SQ_PER_CHANNEL is a matmul of its "
        "own, but no report of them being chosen in a language model is known",
        source=f"TensorRT developer guide, structured sparsity; {SPARSE_WEIGHTS}",
    ),
)
"""Kernels that skip zeros are TensorRT's own; it times them against dense ones and takes the faster. Gains are small:
issue 1731 has 5 % at most for BF16 and FP8 in a model of 843M parameters."""

TENSORRT = Target(
    name="tensorrt",
    title="TensorRT engines by trtllm-build (TensorRT-LLM <= 1.2.x)",
    default_version="1.2.1",
    versions=("1.0.0", "1.1.0", "1.2.0", "1.2.1", "1.3.0rc20"),
    rows=(
        Row(
            formats=("fp8",), sms=(*ADA, *HOPPER, *BLACKWELL), models=("dense",), until=LAST, source=HARDWARE
        ),
        Row(
            formats=("fp8",),
            sms=(*ADA, *HOPPER),
            models=("moe",),
            until=LAST,
            state="limited",
            note=_ONE_INPUT_SCALE,
            source=MOE_PLUGIN,
        ),
        Row(formats=("nvfp4",), sms=BLACKWELL, models=("dense",), until=LAST, source=HARDWARE),
        Row(
            formats=("int4_awq", "int4_gptq"),
            sms=(*AMPERE, *ADA, *HOPPER),
            models=("dense",),
            until=LAST,
            source=HARDWARE,
        ),
        Row(formats=("w4a8_awq",), sms=(*ADA, *HOPPER), models=("dense",), until=LAST, source=HARDWARE),
        Row(
            formats=("int8_sq",),
            sms=(*AMPERE, *ADA, *HOPPER),
            models=("dense",),
            until=LAST,
            source="TensorRT-LLM docs/source/legacy/architecture/checkpoint.md",
        ),
    ),
    kv_rows=(
        Row(
            formats=("fp8", "fp8_cast"), sms=(*AMPERE, *ADA, *HOPPER, *BLACKWELL), until=LAST, source=HARDWARE
        ),
    ),
    sparse_rows=SPARSE,
    deprecated="TensorRT-LLM removed trtllm-build after 1.3.0rc20; --target trtllm loads the same checkpoint",
)

FORMATS = ("fp8", "nvfp4", "int4_awq", "int4_gptq", "w4a8_awq", "int8_sq")
"""Formats that are converted to rank files. Of the others: W8A16 weights are stored in the order of a CUDA kernel
(``symmetric_quantize_last_axis_of_batched_matrix``), which only that kernel writes; row-wise FP8 replaces whole
attention and MLP classes (``fp8_rowwise_quantize``) with parameters of their own."""


def model_refusals(architecture: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Why no rank files are written for this model, from its architecture and config.json; nothing when they are."""
    if architecture not in LEGACY_MODELS:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in LEGACY_MODELS)
        reason = _REFUSED.get(architecture, f"no TensorRT model class is known for it here (known: {known})")
        yield f"{architecture}: {reason}"
        return
    model = LEGACY_MODELS[architecture]
    if model.moe_parent and model.qwen_type:
        dense = config.get("mlp_only_layers") or []
        step = config.get("decoder_sparse_step", 1)
        if dense or step != 1:
            yield (
                f"{architecture} with dense layers (mlp_only_layers {dense}, decoder_sparse_step {step}): 1.0 has "
                "experts in every layer, and which release changed that is not documented"
            )
    if config.get("use_sliding_window") or (
        architecture != "MistralForCausalLM" and model.config == "llama" and config.get("sliding_window")
    ):
        yield f"{architecture} with a sliding window: its engine has full attention in every layer"
    if config.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {config['hidden_act']!r}, expected silu"
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor {config['partial_rotary_factor']}, expected 1"


def mixture_refusals(
    formats_by_role: Mapping[str, frozenset[str]], *, pp: int, head_format: str | None
) -> Iterator[str]:
    """Why this assignment of formats has no place in one legacy checkpoint.

    ``formats_by_role``: role -> formats of its matrices over all layers, ``source`` for those that keep their dtype.
    """
    quantized = sorted(set().union(*formats_by_role.values()) - {"source"}) if formats_by_role else []
    if len(quantized) > 1:
        yield f"several formats ({', '.join(quantized)}) in one checkpoint: one is written here"
    if head_format:
        yield f"an lm_head in {head_format}: it stays in the model's dtype"
    for role, found in formats_by_role.items():
        if len(found) > 1 and pp > 1:
            yield (
                f"{role} quantized in some layers only, with pp={pp}: exclude_modules names layers by their place "
                "within a rank, and holds for all ranks"
            )
