"""Reads one request of the tensorrt_llm model and writes its answers. Used by model.py of both targets.

Runs inside Triton's Python stub: standard library, numpy and triton_python_backend_utils only. The server
checks neither that text_input is there nor that every tensor has one element, so everything is checked here.
"""

import contextlib
import json
import queue
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
INTEGERS = ("max_tokens", "top_k", "best_of", "seed", "logprobs")
FLOATS = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
BOOLEANS = ("ignore_eos", "exclude_input_from_output", "return_perf_metrics", "add_special_tokens")
FLAGS = (
    "streaming",
    "return_finish_reason",
    "return_stop_reason",
    "return_cumulative_logprob",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "stop",
)
ASK_S = 0.01
"""How often a client that was told an error is asked whether it has gone, in seconds."""
QUESTIONS = 100
"""After so many, a second at least, its final flag is sent to a client that stays; /generate answers only then. Counted,
not timed: where a machine stands still for a second, so does the client that was about to leave."""
FINAL_AFTER_LEAVING_S = 0.05
"""The same, in seconds after its client was found to have gone."""
KINDS = {int: "iu", float: "fiu", bool: "b"}
"""Python type -> ``kind`` of the numpy dtypes that hold its values."""


class BadRequest(Exception):
    """The client's mistake: answered with INVALID_ARG (HTTP 400)."""

    def __init__(self, message, code="TC-515"):
        super().__init__(f"{code}: {message}")


@dataclass
class GenerateRequest:
    """One request, checked. ``params`` holds only what the client gave, by its name without
    ``sampling_param_``."""

    request_id: str
    text_input: str = ""
    streaming: bool = False
    return_finish_reason: bool = False
    return_stop_reason: bool = False
    return_cumulative_logprob: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    stop: bool = False
    """Not a generation, but the wish to end the one with the same request id."""
    timeout_s: float | None = None
    """The time that the client gives the whole request, in seconds."""
    params: dict = field(default_factory=dict)


def read_request(request):
    """GenerateRequest of a pb_utils.InferenceRequest; raises BadRequest."""
    timeout_s = _read_parameters(request)
    values = {name: _scalar(request, name, bool) for name in FLAGS}
    flags = {name: value for name, value in values.items() if value is not None}
    if flags.get("stop"):
        return GenerateRequest(request_id=request.request_id(), **flags)
    prompts = _strings(request, "text_input")
    if prompts is None:
        raise BadRequest("text_input is missing: expected one string")
    if len(prompts) != 1:
        raise BadRequest(f"text_input holds {len(prompts)} strings: expected one for each request")
    params = {}
    for names, kind in ((INTEGERS, int), (FLOATS, float), (BOOLEANS, bool)):
        for name in names:
            value = _scalar(request, f"sampling_param_{name}", kind)
            if value is not None:
                params[name] = value
    stop_strings = _strings(request, "sampling_param_stop")
    if stop_strings is not None:
        if not all(stop_strings):
            raise BadRequest("sampling_param_stop holds an empty string: expected text, or leave it out")
        params["stop"] = stop_strings
    return GenerateRequest(
        request_id=request.request_id(), text_input=prompts[0], params=params, timeout_s=timeout_s, **flags
    )


def _read_parameters(request):
    """The timeout in seconds or None; BadRequest for parameters that mean nothing here.

    /generate turns JSON keys that are no input into request parameters instead of refusing them, the timeout too;
    a gRPC request has a field for it.
    """
    known = (
        "id",
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "priority",
        "timeout",
        "binary_data_output",
    )
    text = request.parameters() if hasattr(request, "parameters") else ""
    given = json.loads(text or "{}")
    unknown = sorted(key for key in given if key not in known and not key.startswith("triton_"))
    if unknown:
        raise BadRequest(
            f"unknown request fields: {', '.join(unknown)}; sampling parameters are called "
            "sampling_param_max_tokens, sampling_param_temperature, ..."
        )
    microseconds = given.get("timeout") or request.timeout()
    if not microseconds:
        return None
    if isinstance(microseconds, bool) or not isinstance(microseconds, int) or microseconds < 0:
        raise BadRequest(f"timeout is {microseconds!r}: expected a number of microseconds")
    return microseconds / 1e6


def _scalar(request, name, kind):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    array = tensor.as_numpy()
    if array.size != 1:
        raise BadRequest(f"{name} has {array.size} elements: expected one")
    if array.dtype.kind not in KINDS[kind]:
        raise BadRequest(f"{name} is of type {array.dtype}: expected {kind.__name__}")
    value = kind(array.reshape(-1)[0])
    if kind is float and not np.isfinite(value):
        raise BadRequest(f"{name} is {value}: expected a finite number")
    return value


def _strings(request, name):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    items = tensor.as_numpy().reshape(-1)
    if not items.size:
        raise BadRequest(f"{name} is empty: expected at least one string")
    if items.dtype.kind not in "OSU":
        raise BadRequest(f"{name} is of type {items.dtype}: expected text")
    try:
        return [item.decode("utf-8") if isinstance(item, bytes) else str(item) for item in items]
    except UnicodeDecodeError as error:
        raise BadRequest(f"{name} is not UTF-8 text: {error}") from error


def text_response(text, **extra):
    """InferenceResponse with ``text_output`` and further outputs: name -> str, list of str, int or float."""
    tensors = [_string_tensor("text_output", [text])]
    for name, value in extra.items():
        if isinstance(value, str | list):
            tensors.append(_string_tensor(name, [value] if isinstance(value, str) else value))
        elif isinstance(value, float):
            tensors.append(pb_utils.Tensor(name, np.array([value], dtype=np.float32)))
        else:
            dtype = np.int64 if name.endswith("_time_ns") else np.int32
            tensors.append(pb_utils.Tensor(name, np.array([value], dtype=dtype)))
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _string_tensor(name, texts):
    array = np.empty(len(texts), dtype=np.object_)
    array[:] = [text.encode("utf-8", errors="replace") for text in texts]
    return pb_utils.Tensor(name, array)


def error_response(message, kind="internal"):
    """InferenceResponse of an error. ``kind``: invalid_argument, unavailable, cancelled or internal."""
    codes = {
        "invalid_argument": pb_utils.TritonError.INVALID_ARG,
        "unavailable": pb_utils.TritonError.UNAVAILABLE,
        "cancelled": pb_utils.TritonError.CANCELLED,
    }
    error = pb_utils.TritonError(message, codes.get(kind, pb_utils.TritonError.INTERNAL))
    return pb_utils.InferenceResponse(error=error)


_END_LATER = queue.SimpleQueue()
"""Answers whose last response was an error."""


def _end_later():
    asked = {}  # Answer -> how often its client was asked
    left = {}  # Answer -> when to end it
    next_s = 0.0
    while True:
        with contextlib.suppress(queue.Empty):
            asked[_END_LATER.get(timeout=ASK_S if asked or left else None)] = 0
        if time.monotonic() < next_s:
            continue
        next_s = time.monotonic() + ASK_S
        for answer in list(asked):
            asked[answer] += 1
            if answer.is_left():
                del asked[answer]
                left[answer] = time.monotonic() + FINAL_AFTER_LEAVING_S
        ended = [answer for answer, count in asked.items() if count >= QUESTIONS]
        ended += [answer for answer, when in left.items() if when <= time.monotonic()]
        for answer in ended:
            asked.pop(answer, None)
            left.pop(answer, None)
            answer.end()


threading.Thread(target=_end_later, daemon=True).start()


class Answer:
    """The responses to one request, sent from any thread: pieces, then exactly one last response.

    The lock keeps the question whether the client has gone apart from the last response: the server forgets a
    request with its final flag; asked about it in that moment, it may never unload the model again.
    """

    def __init__(self, request):
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._ended = False

    def piece(self, response):
        with self._lock:
            if not self._ended:
                self._send(response, 0)

    def last(self, response):
        """Send the final response; nothing when there was one already.

        An error goes out before the final flag, not with it: after an error that is first and final,
        generate_stream of tritonserver 2.51 counts the connection as open for ever and cannot stop in time. And some
        time before it: many a client closes its gRPC stream on an error, and where that meets the final flag, the
        server never lets go of the request, so that it can neither unload the model nor replace its version. The flag
        follows the client's leaving, therefore, and comes to one that stays when hardly anybody leaves any more.
        """
        with self._lock:
            if self._ended:
                return
            self._ended = True
            if response.has_error():
                self._send(response, 0)
                _END_LATER.put(self)
            else:
                self._send(response, FINAL)

    def end(self):
        """The final flag alone."""
        with self._lock:
            self._send(None, FINAL)

    def is_left(self):
        """True when the client of an answer that awaits its final flag has gone."""
        with self._lock:
            try:
                return self._sender.is_cancelled()
            except Exception as error:  # of one answer: the thread that asks ends all others, too
                pb_utils.Logger.log_warn(f"whether a client has gone cannot be asked: {error}")
                return False

    def is_cancelled(self):
        with self._lock:
            return not self._ended and self._sender.is_cancelled()

    def _send(self, response, flags):
        """A client that has gone is no reason to end the thread that serves the others."""
        try:
            if response is None:
                self._sender.send(flags=flags)
            else:
                self._sender.send(response, flags=flags)
        except Exception as error:
            pb_utils.Logger.log_warn(f"an answer could not be sent: {error}")
