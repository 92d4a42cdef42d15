"""The optional outputs of the tensorrt_llm model, read from TensorRT-LLM's RequestOutput and CompletionOutput."""

import json

PERF_TIMES = ("arrival_time", "first_scheduled_time", "first_token_time", "last_token_time")


def requested_outputs(output, request):
    """Output name -> value of what ``request`` asked for, of a finished RequestOutput."""
    completion, extra = output.outputs[0], {}
    if request.return_finish_reason:
        extra["finish_reason"] = str(completion.finish_reason)
    if request.return_stop_reason:
        # Stop string, id of the end token, or nothing: then the answer ended for another reason.
        reason = completion.stop_reason
        extra["stop_reason"] = "" if reason is None else str(reason)
    if request.return_cumulative_logprob:
        extra["cumulative_logprob"] = float(completion.cumulative_logprob or 0.0)
    if request.return_num_input_tokens:
        extra["num_input_tokens"] = len(output.prompt_token_ids)
    if request.return_num_output_tokens:
        extra["num_output_tokens"] = len(completion.token_ids)
    metrics = getattr(completion, "request_perf_metrics", None)
    if metrics is not None:
        extra.update(_perf(metrics))
    return extra


def logprobs_from(completion, start, count, tokenizer):
    """The ``logprobs`` of the tokens from number ``start`` on, one JSON object each, with ``count`` alternatives.

    ``completion.logprobs`` has for each token a dict of token id -> Logprob: the ``count`` best tokens, and the
    chosen one wherever it stands; or its log probability alone.
    """
    lines = []
    for token_id, item in zip(
        completion.token_ids[start:], (completion.logprobs or [])[start:], strict=False
    ):
        values = {token_id: item} if isinstance(item, float) else {key: item[key].logprob for key in item}
        best = sorted(values, key=values.get, reverse=True)[:count]
        entry = _token(token_id, values[token_id], tokenizer)
        lines.append(json.dumps({**entry, "top": [_token(key, values[key], tokenizer) for key in best]}))
    return lines


def _token(token_id, logprob, tokenizer):
    text = tokenizer.decode([token_id])
    whole = "\N{REPLACEMENT CHARACTER}" not in text
    # JSON has no -inf; OpenAI's API writes this number for it.
    logprob = max(float(logprob), -9999.0)
    return {
        "token_id": int(token_id),
        "token": text,
        "bytes": list(text.encode("utf-8")) if whole else None,
        "logprob": logprob,
    }


def _perf(metrics):
    cache, times, draft = metrics.kv_cache_metrics, metrics.timing_metrics, metrics.speculative_decoding
    extra = {f"{name}_ns": _nanoseconds(getattr(times, name)) for name in PERF_TIMES}
    extra.update(
        kv_cache_reused_block=int(cache.num_reused_blocks),
        kv_cache_missed_block=int(cache.num_missed_blocks),
        kv_cache_alloc_new_blocks=int(cache.num_new_allocated_blocks),
        kv_cache_alloc_total_blocks=int(cache.num_total_allocated_blocks),
        kv_cache_hit_rate=float(cache.kv_cache_hit_rate),
        acceptance_rate=float(draft.acceptance_rate),
        total_accepted_draft_tokens=int(draft.total_accepted_draft_tokens),
        total_draft_tokens=int(draft.total_draft_tokens),
    )
    return extra


def _nanoseconds(moment):
    """``moment`` is a datetime.timedelta since a clock's epoch."""
    return ((moment.days * 86_400 + moment.seconds) * 1_000_000 + moment.microseconds) * 1_000
