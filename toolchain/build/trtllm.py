"""The bundle of target ``trtllm``: LLM-API arguments and the lock of versions beside the checkpoint.

TensorRT-LLM's PyTorch backend has no persisted engine: it loads the Hugging Face checkpoint, tunes its kernels and
captures CUDA graphs at start. What can be fixed ahead are its arguments. Every key is one of the release's own
(``llmapi/data``); there is no ``build_config``, which the PyTorch backend refuses.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from toolchain.build.llmapi.check import require_arguments
from toolchain.build.llmapi.merge import merge, override_findings
from toolchain.core.errors import FindingsError
from toolchain.core.findings import Finding, errors
from toolchain.core.gpus import get_gpu
from toolchain.core.images import trtllm_image
from toolchain.core.roles import Role
from toolchain.families import Family
from toolchain.formats import get_format, get_kv_cache
from toolchain.plan.backends import wish_of
from toolchain.plan.types import SOURCE_DTYPE, Plan
from toolchain.targets.trtllm import moe_backend

GIB = 1024**3
ORDER = (
    "backend",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "moe_expert_parallel_size",
    "moe_tensor_parallel_size",
    "enable_attention_dp",
    "max_batch_size",
    "max_seq_len",
    "max_num_tokens",
    "enable_chunked_prefill",
    "kv_cache_config",
    "moe_config",
    "nvfp4_gemm_config",
    "cuda_graph_config",
    "enable_autotuner",
    "speculative_config",
)
"""How llm_args.yaml is sorted; everything else follows."""


def max_num_tokens(plan: Plan) -> int:
    """Tokens of one step: each running request needs one."""
    return max(plan.serving.max_num_tokens, plan.serving.max_batch_size)


def plan_findings(plan: Plan) -> list[Finding]:
    """What is wrong with the LLM API's arguments that ``plan`` passes through; nothing for other targets."""
    return override_findings(plan.serving.llm_args, plan.target_version) if plan.target == "trtllm" else []


def llm_args(plan: Plan, family: Family, *, is_moe: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """(keyword arguments of ``LLM()``, key -> reason).

    FindingsError TC-404 where the release does not take them, whoever asked for them.
    """
    found = plan_findings(plan)
    if errors(found):
        raise FindingsError("these arguments of the LLM API cannot be passed through", found, code="TC-404")
    arguments, reasons = _planned(plan)
    if is_moe:
        _add_experts(plan, family, arguments, reasons)
    arguments = merge(arguments, plan.serving.llm_args)
    arguments = {key: arguments[key] for key in sorted(arguments, key=_place)}
    reasons |= dict.fromkeys(plan.serving.llm_args, "passed through with llm_args")
    warnings = require_arguments(arguments, plan.target_version, where="llm_args.yaml")
    if warnings:
        reasons[""] = "; ".join(dict.fromkeys(f"{item.message} ({item.hint})" for item in warnings))
    return arguments, reasons


def _place(key: str) -> int:
    return ORDER.index(key) if key in ORDER else len(ORDER)


def _planned(plan: Plan) -> tuple[dict[str, Any], dict[str, str]]:
    """Arguments of every model."""
    serving = plan.serving
    arguments: dict[str, Any] = {
        "backend": "pytorch",
        "tensor_parallel_size": serving.tp,
        "pipeline_parallel_size": serving.pp,
        "max_batch_size": serving.max_batch_size,
        "max_seq_len": serving.max_seq_len,
        "max_num_tokens": max_num_tokens(plan),
        "enable_chunked_prefill": serving.chunked_prefill,
        "kv_cache_config": {
            "dtype": (get_kv_cache(plan.kv_cache).quant_algo or "auto").lower(),
            "free_gpu_memory_fraction": serving.kv_fraction,
            "enable_block_reuse": True,
        },
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": serving.max_batch_size},
        "enable_autotuner": True,
        "trust_remote_code": False,
    }
    reasons = _reasons(plan)
    if serving.attention_dp:
        arguments["enable_attention_dp"] = True
        reasons["enable_attention_dp"] = "each rank attends to requests of its own, with all heads"
    return arguments, reasons


def _reasons(plan: Plan) -> dict[str, str]:
    """Why the arguments of every model are as they are, with the plan's figures."""
    serving, memory = plan.serving, plan.estimates
    weights, step, cache, whole = (
        f"{count / GIB:.1f} GiB"
        for count in (
            memory.weights_per_gpu_bytes,
            memory.activations_per_gpu_bytes,
            memory.kv_cache_per_gpu_bytes,
            memory.gpu_memory_bytes,
        )
    )
    each = " on each rank" if serving.attention_dp else ""
    steps = "longer prompts are prefilled in several steps of max_num_tokens"
    quantized = get_kv_cache(plan.kv_cache).quant_algo
    return {
        "backend": "the only backend of the LLM API from 1.3 on",
        "tensor_parallel_size": f"{serving.tp} x {serving.pp} GPUs, world_size of versions.lock.json",
        "max_batch_size": f"requests at once{each}; planned for each GPU: weights {weights}, one step {step}, KV cache "
        f"{cache} of {whole}",
        "max_num_tokens": "tokens of one step, prompts and answers together; its buffers are in the planned memory",
        "enable_chunked_prefill": steps
        if serving.chunked_prefill
        else "not wanted: a prompt longer than max_num_tokens is refused",
        "kv_cache_config.dtype": "as the checkpoint was quantized for" if quantized else "the model's own",
        "kv_cache_config.free_gpu_memory_fraction": f"of what weights and buffers leave; the planned batch needs "
        f"{cache}, the rest keeps prefixes for reuse",
        "cuda_graph_config": "decoding steps up to max_batch_size are captured, others padded to the next captured one",
        "enable_autotuner": "kernels are timed for these shapes at start",
    }


def _add_experts(plan: Plan, family: Family, arguments: dict[str, Any], reasons: dict[str, str]) -> None:
    """Arguments of a mixture of experts."""
    serving = plan.serving
    if serving.tp > 1:
        arguments["moe_expert_parallel_size"] = serving.ep
        arguments["moe_tensor_parallel_size"] = serving.tp // serving.ep
        reasons["moe_expert_parallel_size"] = (
            f"whole experts over {serving.ep} ranks, each cut over {serving.tp // serving.ep}; their product is "
            "tensor_parallel_size"
        )
    backend, reason = _moe_backend(plan, family)
    config: dict[str, Any] = {"backend": backend}
    reasons["moe_config.backend"] = reason
    if serving.eplb_slots:
        config["load_balancer"] = {
            "num_slots": serving.eplb_slots,
            "layer_updates_per_iter": serving.eplb_layer_updates,
        }
        moves = (
            f"{serving.eplb_layer_updates} layers are placed anew in each iteration"
            if serving.eplb_layer_updates
            else "their placement stays as at start"
        )
        reasons["moe_config.load_balancer"] = (
            f"expert slots of a layer over {serving.ep} ranks, replicas of busy experts included; {moves}"
        )
    arguments["moe_config"] = config
    if backend == "MARLIN":
        arguments["nvfp4_gemm_config"] = {"allowed_backends": ["marlin"]}
        reasons["nvfp4_gemm_config"] = "the dense NVFP4 layers need the same kernels on this GPU"


def _moe_backend(plan: Plan, family: Family) -> tuple[str, str]:
    """The backend for the format of most experts; layers in another one fall back to CUTLASS by themselves."""
    sizes: Counter[str] = Counter()
    for item in plan.assignments:
        if item.role == Role.ROUTED_EXPERT.value and item.format != SOURCE_DTYPE:
            sizes[item.format] += item.parameters
    wish = wish_of(plan.serving)
    if not sizes and wish.backend:
        return wish.backend, "asked for; the experts keep the source dtype"
    if not sizes:
        return "CUTLASS", "the experts keep the source dtype, which it runs everywhere"
    ((name, _),) = sizes.most_common(1)
    return moe_backend(plan.target_version, get_gpu(plan.gpu).sm, get_format(name), family, wish)


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
    """llm_args.yaml: each argument below the reason for it. ``reasons[""]`` is about all of them."""
    import textwrap

    import yaml

    def comment(text: str) -> str:
        return "".join(f"# {line}\n" for line in textwrap.wrap(text, 108, break_long_words=False))

    parts = [comment(reasons[""]) + "\n"] if reasons.get("") else []
    for key, value in arguments.items():
        said = {
            name.partition(".")[2]: text for name, text in reasons.items() if name.partition(".")[0] == key
        }
        about = [f"{name}: {text}" if name else text for name, text in said.items()]
        parts.append("".join(map(comment, about)) + yaml.safe_dump({key: value}, sort_keys=False))
    return "".join(parts)
