"""Inputs and outputs of the ``tensorrt_llm`` model: one table for both targets, so that a client does not
care.

Names, types and dims are those of TensorRT-LLM's ``llmapi`` Triton model (its text part; ``image_url`` and
``lora_*`` are left out, so the server itself refuses them). Ours are the inputs ``sampling_param_ignore_eos``
(benchmarks need answers of a fixed length), ``sampling_param_add_special_tokens`` (a chat template brings its own),
``sampling_param_repetition_penalty`` and ``sampling_param_logprobs``, all four with the names and meanings that
``SamplingParams`` of TensorRT-LLM has, and ``return_num_input_tokens`` and ``return_num_output_tokens``, which the
ensemble of ``inflight_batcher_llm`` had. The output ``logprobs`` holds one JSON object for each token of a response.
"""

from __future__ import annotations

from dataclasses import dataclass

MODEL_NAME = "tensorrt_llm"
"""The model's name in Triton, the same for every engine and target."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    name: str
    data_type: str
    """``DataType`` of Triton's model_config.proto, such as ``TYPE_STRING``."""
    dims: tuple[int, ...] = (1,)
    optional: bool = True
    """Inputs only."""


def _tensors(data_type: str, dims: tuple[int, ...], *names: str) -> tuple[Tensor, ...]:
    return tuple(Tensor(name=name, data_type=data_type, dims=dims) for name in names)


INPUTS: tuple[Tensor, ...] = (
    Tensor(name="text_input", data_type="TYPE_STRING", dims=(-1,), optional=False),
    *_tensors("TYPE_BOOL", (1,), "streaming"),
    *_tensors(
        "TYPE_INT32", (1,), "sampling_param_max_tokens", "sampling_param_top_k", "sampling_param_best_of"
    ),
    *_tensors("TYPE_FP32", (1,), "sampling_param_temperature", "sampling_param_top_p"),
    *_tensors("TYPE_FP32", (1,), "sampling_param_frequency_penalty", "sampling_param_presence_penalty"),
    *_tensors("TYPE_FP32", (1,), "sampling_param_repetition_penalty"),
    *_tensors("TYPE_INT32", (1,), "sampling_param_logprobs"),
    *_tensors("TYPE_STRING", (-1,), "sampling_param_stop"),
    *_tensors("TYPE_UINT64", (1,), "sampling_param_seed"),
    *_tensors("TYPE_BOOL", (1,), "sampling_param_ignore_eos", "sampling_param_exclude_input_from_output"),
    *_tensors("TYPE_BOOL", (1,), "sampling_param_add_special_tokens"),
    *_tensors(
        "TYPE_BOOL", (1,), "sampling_param_return_perf_metrics", "return_finish_reason", "return_stop_reason"
    ),
    *_tensors("TYPE_BOOL", (1,), "return_cumulative_logprob", "stop"),
    *_tensors("TYPE_BOOL", (1,), "return_num_input_tokens", "return_num_output_tokens"),
)

OUTPUTS: tuple[Tensor, ...] = (
    *_tensors("TYPE_STRING", (-1,), "text_output", "finish_reason", "stop_reason", "logprobs"),
    *_tensors("TYPE_FP32", (-1,), "cumulative_logprob"),
    *_tensors(
        "TYPE_INT32", (-1,), "kv_cache_reused_block", "kv_cache_missed_block", "kv_cache_alloc_new_blocks"
    ),
    *_tensors("TYPE_INT32", (-1,), "kv_cache_alloc_total_blocks"),
    *_tensors("TYPE_FP32", (-1,), "kv_cache_hit_rate"),
    *_tensors("TYPE_INT64", (1,), "arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns"),
    *_tensors("TYPE_INT64", (1,), "last_token_time_ns"),
    *_tensors("TYPE_FP32", (1,), "acceptance_rate"),
    *_tensors("TYPE_INT32", (1,), "total_accepted_draft_tokens", "total_draft_tokens"),
    *_tensors("TYPE_INT32", (1,), "num_input_tokens", "num_output_tokens"),
)
