"""From a request to the inputs of the model, and how its answers are asked for."""

from __future__ import annotations

from typing import Any

from toolchain.openai.failures import too_long
from toolchain.openai.fields import ChatRequest, CompletionRequest, Sampling
from toolchain.openai.prompts import Prompt

COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for completions."""
UNKNOWN_CONTEXT_TOKENS = 1024
"""max_tokens of a chat where the model's context is not known and none was asked for."""
SEEDS = 2**64


def model_inputs(request: Sampling, prompt: Prompt, index: int, max_seq_len: int | None) -> dict[str, Any]:
    """Inputs for the ``index``-th answer to ``prompt``. ApiError 400 where prompt and answer exceed the context.

    Only what differs from "nothing asked" is sent, so that a model without an input is not asked for it.
    """
    inputs: dict[str, Any] = {
        "text_input": prompt.text,
        "streaming": bool(request.stream),
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "sampling_param_max_tokens": _max_tokens(request, prompt, max_seq_len),
        "sampling_param_temperature": 1.0 if request.temperature is None else request.temperature,
    }
    if not prompt.special:
        inputs["sampling_param_add_special_tokens"] = False
    if request.top_p is not None and request.top_p < 1:
        inputs["sampling_param_top_p"] = request.top_p
    if request.top_k is not None and request.top_k > 0:
        inputs["sampling_param_top_k"] = request.top_k
    if request.seed is not None:
        inputs["sampling_param_seed"] = (request.seed + index) % SEEDS
    if request.stop:
        inputs["sampling_param_stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
    if request.ignore_eos:
        inputs["sampling_param_ignore_eos"] = True
    for name, neutral in (("frequency_penalty", 0), ("presence_penalty", 0), ("repetition_penalty", 1)):
        value = getattr(request, name)
        if value is not None and value != neutral:
            inputs[f"sampling_param_{name}"] = value
    logprobs = wanted_logprobs(request)
    if logprobs is not None:
        inputs["sampling_param_logprobs"] = logprobs
    if isinstance(request, CompletionRequest) and request.echo:
        inputs["sampling_param_exclude_input_from_output"] = False
    return inputs


def wanted_logprobs(request: Sampling) -> int | None:
    """How many tokens beside the chosen one; None: no log probabilities at all."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs if isinstance(request, CompletionRequest) else None


def _max_tokens(request: Sampling, prompt: Prompt, max_seq_len: int | None) -> int:
    wanted = request.max_tokens
    param = "prompt"
    if isinstance(request, ChatRequest):
        wanted = request.max_completion_tokens or wanted
        param = "messages"
    if wanted is None:
        if max_seq_len is None:
            return COMPLETION_TOKENS if isinstance(request, CompletionRequest) else UNKNOWN_CONTEXT_TOKENS
        rest = max_seq_len - prompt.tokens
        return min(COMPLETION_TOKENS, rest) if isinstance(request, CompletionRequest) else rest
    if max_seq_len is not None and prompt.tokens + wanted > max_seq_len:
        raise too_long(prompt.tokens, max_seq_len, wanted=wanted, param=param)
    return wanted
