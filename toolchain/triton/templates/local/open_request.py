"""A request of the tensorrt_llm model that the engine process works on: what is asked of it, what its answer holds."""

import json
import time

from helpers import BadRequest

TIMES = ("first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")


def engine_message(request, max_prompt_bytes=None):
    """The ``generate`` message, without id. BadRequest for what the engine does not do."""
    params = dict(request.params)
    if params.pop("best_of", 1) != 1:
        raise BadRequest(
            "sampling_param_best_of is not supported by target local: it generates one answer for each request; "
            "leave it out, or send the request several times with different seeds"
        )
    if max_prompt_bytes is not None and len(request.text_input.encode("utf-8")) > max_prompt_bytes:
        # 10 MB of text need not go through the pipe to be refused.
        raise BadRequest(
            f"text_input has {len(request.text_input.encode('utf-8'))} bytes: as many tokens as max_seq_len allows "
            f"hold at most {max_prompt_bytes}; shorten it",
            code="TC-503",
        )
    params.pop("return_perf_metrics", None)
    if request.return_cumulative_logprob:
        params.setdefault("logprobs", 0)
    message = {"op": "generate", "text_input": request.text_input, "params": params}
    if not request.streaming:
        message["stream"] = False
    if request.timeout_s is not None:
        message["timeout_s"] = request.timeout_s
    return message


class OpenRequest:
    """``request``: a GenerateRequest; ``answer``: where its responses go."""

    def __init__(self, request, answer):
        self.request = request
        self.answer = answer
        self.cancelling = False
        self._arrival_ns = time.time_ns()
        self._deadline_s = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        self._last_ns = 0
        self._tokens = 0

    def overdue(self, margin_s):
        """Whether its timeout passed ``margin_s`` ago."""
        return self._deadline_s is not None and time.monotonic() > self._deadline_s + margin_s

    def take(self, chunk, now_ns, metrics):
        """Note what ``chunk``, received at ``now_ns``, says about tokens and times."""
        count = len(chunk["token_ids"])
        self._tokens += count
        if self._last_ns:
            metrics.tokens((now_ns - self._last_ns) / 1e9, count)
        self._last_ns = now_ns
        if chunk.get("finish_reason") is None:
            return
        _, scheduled, first, last = chunk.get("times_ns") or (0, 0, 0, 0)
        if count == self._tokens and first:
            metrics.tokens((last - first) / 1e9, count - 1)
        metrics.count("toolchain_prompt_tokens_total", chunk.get("prompt_tokens", 0))
        metrics.count("toolchain_generated_tokens_total", self._tokens)
        for name, moment in (
            ("toolchain_queue_seconds", scheduled),
            ("toolchain_time_to_first_token_seconds", first),
            ("toolchain_request_seconds", last),
        ):
            if moment:
                metrics.observe(name, max(0, moment - self._arrival_ns) / 1e9)

    def outputs(self, chunk):
        """Output name -> value of what was asked for, of any chunk."""
        if "logprobs" not in self.request.params:
            return {}
        # One JSON object for each token of this response.
        return {"logprobs": [json.dumps(item) for item in chunk.get("logprobs", ())]}

    def last_outputs(self, chunk):
        """The same of the chunk that ends the answer."""
        request, extra = self.request, self.outputs(chunk)
        if request.return_finish_reason:
            extra["finish_reason"] = chunk["finish_reason"]
        if request.return_stop_reason:
            # Stop string, id of the end token, or nothing: then the answer ended for another reason.
            extra["stop_reason"] = str(chunk.get("stop_reason", ""))
        if request.return_cumulative_logprob:
            extra["cumulative_logprob"] = float(chunk.get("cumulative_logprob", 0.0))
        if request.return_num_input_tokens:
            extra["num_input_tokens"] = chunk["prompt_tokens"]
        if request.return_num_output_tokens:
            extra["num_output_tokens"] = self._tokens
        if request.params.get("return_perf_metrics"):
            times = chunk.get("times_ns") or (0, 0, 0, 0)
            extra["arrival_time_ns"] = self._arrival_ns
            extra.update(zip(TIMES, times[1:], strict=True))
        return extra
