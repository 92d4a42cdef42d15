"""What trtllm-build is told for a plan, with reasons, here and in NVIDIA's container."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from toolchain.build.tensorrt.flags import check_arguments
from toolchain.core.gpus import get_gpu
from toolchain.core.images import trtllm_image
from toolchain.core.roles import Role
from toolchain.formats.kv import get_kv_cache
from toolchain.plan.types import Plan

PROGRAM = "trtllm-build"
MAX_NUM_TOKENS = 8192
"""Tokens of one scheduler step, and trtllm-build's own default (``BuildConfig.max_num_tokens``)."""
CHECKPOINT, ENGINE = "trtllm_checkpoint", "engine"
"""Directories inside an engine bundle."""
MOUNT = "/bundle"
FP8_ATTENTION = ("fp8", "w4a8_awq", "nvfp4")
"""Formats with which FP8 context FMHA works: ``tensorrt_llm/builder.py`` turns it off for others, and paged context
FMHA with it when the KV cache is FP8."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    flag: str
    value: str
    """Empty for a switch."""
    reason: str = ""


def choices(plan: Plan) -> tuple[Choice, ...]:
    """Everything that the plan decides, without directories."""
    serving = plan.serving
    made = [
        Choice(flag="max_batch_size", value=str(serving.max_batch_size)),
        Choice(
            flag="max_input_len", value=str(max_input_len(plan)), reason="an answer has one token at least"
        ),
        Choice(flag="max_seq_len", value=str(serving.max_seq_len)),
        Choice(flag="max_num_tokens", value=str(max(MAX_NUM_TOKENS, serving.max_batch_size))),
        Choice(flag="max_beam_width", value="1", reason="sampling only"),
        Choice(flag="kv_cache_type", value="paged", reason="in-flight batching needs it"),
        Choice(flag="remove_input_padding", value="enable", reason="in-flight batching needs it"),
        Choice(flag="gpt_attention_plugin", value="auto", reason="in-flight batching needs it"),
        _gemm(plan),
        *_attention(plan),
    ]
    if any(item.role == Role.ROUTED_EXPERT.value for item in plan.assignments):
        made.append(Choice(flag="moe_plugin", value="auto", reason="experts in one kernel"))
    if plan.sparsity is not None:
        why = "2:4 sparse weights: TensorRT times kernels that skip zeros beside dense ones"
        made.append(Choice(flag="weight_sparsity", value="", reason=why))
    if serving.tp * serving.pp > 1:
        made += [
            Choice(flag="nccl_plugin", value="auto", reason="several ranks"),
            Choice(
                flag="workers", value=str(serving.tp * serving.pp), reason="one per rank, at most one per GPU"
            ),
        ]
    return (*made, Choice(flag="log_level", value="info", reason="progress is read from the log"))


def max_input_len(plan: Plan) -> int:
    return max(1, plan.serving.max_seq_len - 1)


def uses_paged_context(plan: Plan) -> bool:
    """Whether prompts may be prefilled in chunks and cached blocks used again."""
    return _kv(plan) is None or set(plan.formats) <= set(FP8_ATTENTION)


def _kv(plan: Plan) -> str | None:
    return get_kv_cache(plan.kv_cache).quant_algo


def _gemm(plan: Plan) -> Choice:
    source = "docs/source/legacy/performance/performance-tuning-guide/useful-build-time-flags.md"
    if plan.formats == ("fp8",):
        return Choice(flag="gemm_plugin", value="disable", reason=f"recommended for FP8 ({source})")
    if plan.formats == ("nvfp4",):
        reason = "the FP4 matmul is this plugin's (FP4Linear in tensorrt_llm/quantization/layers.py)"
        return Choice(flag="gemm_plugin", value="nvfp4", reason=reason)
    return Choice(flag="gemm_plugin", value="auto", reason=f"recommended for 16-bit matmuls ({source})")


def _attention(plan: Plan) -> list[Choice]:
    paged, fp8 = uses_paged_context(plan), _kv(plan) == "FP8" and set(plan.formats) <= set(FP8_ATTENTION)
    fp8 = fp8 and get_gpu(plan.gpu).sm >= 89
    why = "chunked prefill and reuse of cached blocks"
    if not paged:
        why = f"an FP8 KV cache has it with FP8 attention only, and {plan.format} has none (tensorrt_llm/builder.py)"
    return [
        Choice(flag="use_paged_context_fmha", value=_switch(paged), reason=why),
        Choice(
            flag="use_fp8_context_fmha",
            value=_switch(fp8),
            reason="FP8 attention goes with an FP8 KV cache on SM89 and later",
        ),
    ]


def _switch(on: bool) -> str:
    return "enable" if on else "disable"


def arguments(plan: Plan, bundle: Path) -> list[str]:
    """Words after ``trtllm-build`` for a bundle at ``bundle``; checked against the flags of the plan's release."""
    words = ["--checkpoint_dir", str(bundle / CHECKPOINT), "--output_dir", str(bundle / ENGINE)]
    for choice in choices(plan):
        words += [f"--{choice.flag}", *([choice.value] if choice.value else [])]
    check_arguments(words, plan.target_version)
    return words


def image(version: str) -> str:
    """NVIDIA's container of a release."""
    return trtllm_image(version).reference


def container_command(plan: Plan, bundle: Path) -> str:
    """The same in NVIDIA's container of the plan's release, as one line for a shell."""
    words = [
        "docker", "run", "--rm", "--gpus", "all", "--ipc=host", "--ulimit", "memlock=-1", "--ulimit",
        "stack=67108864", "--volume", f"{bundle.absolute()}:{MOUNT}", image(plan.target_version), PROGRAM,
        *arguments(plan, Path(MOUNT)),
    ]  # fmt: skip
    return shlex.join(words)
