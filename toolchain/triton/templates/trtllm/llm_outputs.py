"""The optional outputs of the tensorrt_llm model, read from TensorRT-LLM's CompletionOutput."""

PERF_TIMES = ("arrival_time", "first_scheduled_time", "first_token_time", "last_token_time")


def requested_outputs(completion, request):
    """Output name -> value of what ``request`` asked for, of a finished CompletionOutput."""
    extra = {}
    if request.return_finish_reason:
        extra["finish_reason"] = str(completion.finish_reason)
    if request.return_stop_reason:
        extra["stop_reason"] = str(completion.stop_reason)
    if request.return_cumulative_logprob:
        extra["cumulative_logprob"] = float(completion.cumulative_logprob or 0.0)
    metrics = getattr(completion, "request_perf_metrics", None)
    if metrics is not None:
        extra.update(_perf(metrics))
    return extra


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
