"""The bundle of target ``trtllm``: LLM-API arguments and the lock of versions beside the checkpoint.

TensorRT-LLM's PyTorch backend has no persisted engine: it loads the Hugging Face checkpoint, tunes its kernels and
captures CUDA graphs at start. What can be fixed ahead are its arguments. Keys: ``tensorrt_llm/llmapi/llm_args.py``
(a strict model: unknown keys are refused there).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from toolchain.core.gpus import get_gpu
from toolchain.core.images import trtllm_image
from toolchain.core.roles import Role
from toolchain.families import Family
from toolchain.formats import get_format, get_kv_cache
from toolchain.plan.types import SOURCE_DTYPE, Plan
from toolchain.targets.trtllm import moe_backend

KV_MEMORY_FRACTION = 0.85
"""Share of the memory left after loading that the KV cache may take; the rest is for workspaces and graphs."""
MAX_NUM_TOKENS = 8192
"""Tokens of one scheduler step; longer prompts are prefilled in chunks. TensorRT-LLM's own default."""


def llm_args(plan: Plan, family: Family, *, is_moe: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """(keyword arguments of ``LLM()``, key -> reason for what is not obvious)."""
    serving = plan.serving
    arguments: dict[str, Any] = {
        "backend": "pytorch",
        "tensor_parallel_size": serving.tp,
        "pipeline_parallel_size": serving.pp,
        "max_batch_size": serving.max_batch_size,
        "max_seq_len": serving.max_seq_len,
        "max_num_tokens": max(MAX_NUM_TOKENS, serving.max_batch_size),
        "enable_chunked_prefill": True,
        "kv_cache_config": {
            "dtype": (get_kv_cache(plan.kv_cache).quant_algo or "auto").lower(),
            "free_gpu_memory_fraction": KV_MEMORY_FRACTION,
            "enable_block_reuse": True,
        },
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": serving.max_batch_size},
        "trust_remote_code": False,
    }
    reasons = {}
    if is_moe:
        if serving.ep > 1:
            arguments["moe_expert_parallel_size"] = serving.ep
        backend, reason = _moe_backend(plan, family)
        arguments["moe_config"] = {"backend": backend}
        reasons["moe_config.backend"] = reason
        if backend == "MARLIN":
            arguments["nvfp4_gemm_config"] = {"allowed_backends": ["marlin"]}
            reasons["nvfp4_gemm_config"] = "the dense NVFP4 layers need the same kernels on this GPU"
    return arguments, reasons


def _moe_backend(plan: Plan, family: Family) -> tuple[str, str]:
    """The backend for the format of most experts; layers in another one fall back to CUTLASS by themselves."""
    sizes: Counter[str] = Counter()
    for item in plan.assignments:
        if item.role == Role.ROUTED_EXPERT.value and item.format != SOURCE_DTYPE:
            sizes[item.format] += item.parameters
    if not sizes:
        return "CUTLASS", "the experts keep the source dtype, which it runs everywhere"
    ((name, _),) = sizes.most_common(1)
    return moe_backend(plan.target_version, get_gpu(plan.gpu).sm, get_format(name), family)


def version_lock(plan: Plan) -> dict[str, Any]:
    """What must be the same where this bundle is served."""
    gpu = get_gpu(plan.gpu)
    return {
        "tensorrt_llm": plan.target_version,
        "image": trtllm_image(plan.target_version).reference,
        "gpu": gpu.name,
        "sm": gpu.sm,
        "world_size": plan.serving.tp * plan.serving.pp,
    }


def render_yaml(arguments: dict[str, Any], reasons: dict[str, str]) -> str:
    """llm_args.yaml: the arguments, with the reasons as comments at the top."""
    import yaml

    comments = "".join(f"# {key}: {reason}\n" for key, reason in reasons.items())
    return f"{comments}{yaml.safe_dump(arguments, sort_keys=False)}"
