"""What a user passes through to the LLM API (``llm_args`` of a plan), merged over what the plan decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from toolchain.build.llmapi.check import WRONG, argument_findings
from toolchain.core.findings import Finding

OPTION = "--llm-args"
DECIDED = "TC-407"
PLANNED = {
    "model": "it is the engine's own checkpoint",
    "backend": "target trtllm is the PyTorch backend",
    "tensor_parallel_size": "use --tp",
    "pipeline_parallel_size": "use --pp",
    "moe_expert_parallel_size": "use --ep",
    "moe_tensor_parallel_size": "use --ep: the ranks of --tp that it leaves cut each expert",
    "enable_attention_dp": "use --attention-dp",
    "max_batch_size": "use --max-batch-size",
    "max_seq_len": "use --max-seq-len",
    "max_num_tokens": "use --max-num-tokens",
    "enable_chunked_prefill": "use --chunked-prefill",
    "moe_config.backend": "use --moe-backend",
    "moe_config.load_balancer.num_slots": "use --eplb-slots",
    "moe_config.load_balancer.layer_updates_per_iter": "use --eplb-layer-updates",
    "kv_cache_config.dtype": "use --kv-cache, which also decides what the checkpoint says",
}
"""Arguments that have an option, because memory, checks or other files depend on them."""


def override_findings(overrides: Mapping[str, Any], version: str) -> list[Finding]:
    """Everything that is wrong with ``llm_args`` of a plan for TensorRT-LLM ``version``; nothing for none."""
    if not overrides:
        return []
    decided = [
        Finding(
            code=DECIDED, where=f"{OPTION}: {path}", message=f"the plan decides {path}", hint=PLANNED[path]
        )
        for path in _paths(overrides)
        if path in PLANNED
    ]
    return [*decided, *argument_findings(overrides, version, where=OPTION), *_graph_sizes(overrides)]


def _paths(value: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, item in value.items():
        path = f"{before}{key}"
        yield path
        if isinstance(item, Mapping):
            yield from _paths(item, f"{path}.")


def _graph_sizes(overrides: Mapping[str, Any]) -> Iterator[Finding]:
    """``CudaGraphConfig`` refuses a largest size that is not the largest of the sizes (its validators, 1.2 on)."""
    config = overrides.get("cuda_graph_config")
    if not isinstance(config, Mapping) or not {"batch_sizes", "max_batch_size"} <= set(config):
        return
    sizes, largest = config["batch_sizes"], config["max_batch_size"]
    if (
        isinstance(sizes, list)
        and sizes
        and all(isinstance(size, int) for size in sizes)
        and max(sizes) != largest
    ):
        yield Finding(
            code=WRONG,
            where=f"{OPTION}: cuda_graph_config",
            message=f"max_batch_size is {largest}, the largest of batch_sizes {max(sizes)}",
            hint="leave max_batch_size out",
        )


def merge(arguments: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``overrides`` over ``arguments``: mappings key by key, everything else, null too, replaces what was there."""
    merged = dict(arguments)
    for key, item in overrides.items():
        below = merged.get(key)
        merged[key] = merge(below, item) if isinstance(below, dict) and isinstance(item, Mapping) else item
    sizes = overrides.get("cuda_graph_config")
    if isinstance(sizes, Mapping) and "batch_sizes" in sizes and "max_batch_size" not in sizes:
        # The sizes say it themselves, and both must agree.
        merged["cuda_graph_config"].pop("max_batch_size", None)
    return merged
