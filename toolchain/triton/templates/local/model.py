"""Triton model of target local: forwards requests to the engine process, which batches them, and its answers
back.

Decoupled: ``execute`` returns at once, answers are sent from the reader thread as they come. With
``streaming`` each piece of text is one response; without, one response holds the whole text.
"""

import json
import os
import threading
import time
from dataclasses import dataclass, field

import triton_python_backend_utils as pb_utils
from engine_process import EngineFailed, EngineProcess
from helpers import Answer, BadRequest, GenerateRequest, error_response, read_request, text_response

NEUTRAL = {"best_of": 1, "frequency_penalty": 0.0, "presence_penalty": 0.0}
"""Sampling parameters of the contract that this engine does not have, and the value that asks for nothing."""


@dataclass
class Open:
    """A request that the engine process is working on."""

    request: GenerateRequest
    answer: Answer
    arrival_ns: int
    first_ns: int = 0
    pieces: list = field(default_factory=list)
    cancelling: bool = False


def read_served():
    """The settings of this version: another version of the model may run another engine. Raises
    TritonModelException."""
    path = os.path.join(pb_utils.get_model_dir(), "served.json")
    try:
        with open(path, encoding="utf-8") as handle:
            served = json.load(handle)
        for key in ("engine_dir", "python"):
            if not isinstance(served[key], str):
                raise TypeError(f"{key} is {served[key]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise pb_utils.TritonModelException(
            f"{path}: expected an object with the paths engine_dir and python: {error!r}"
        ) from error
    return served


class TritonPythonModel:
    def initialize(self, args):
        served = read_served()
        engine_dir, python = served["engine_dir"], served["python"]
        for path, found in ((engine_dir, os.path.isdir(engine_dir)), (python, os.path.isfile(python))):
            if not found:
                raise pb_utils.TritonModelException(
                    f"{path} does not exist; this repository was rendered for another place: "
                    "run `toolchain triton` again"
                )
        self._open = {}
        self._lock = threading.Lock()
        self._next_id = 0
        self._finalizing = threading.Event()
        self._engine = EngineProcess(
            [python, "-m", "toolchain.runtime.worker", engine_dir],
            ready_timeout_s=float(served.get("ready_timeout_s", 1800)),
            on_message=self._on_message,
            on_death=self._on_death,
            log=pb_utils.Logger.log_error,
        )
        try:
            self._engine.start()
        except EngineFailed as error:
            raise pb_utils.TritonModelException(f"the engine {engine_dir} did not start: {error}") from error
        self._period_s = float(served.get("cancellation_check_period_ms", 100)) / 1000.0
        threading.Thread(target=self._watch_cancellations, daemon=True).start()

    def execute(self, requests):
        for request in requests:
            answer = Answer(request)
            try:
                self._forward(read_request(request), answer)
            except BadRequest as error:
                answer.last(error_response(str(error), "invalid_argument"))
            except EngineFailed as error:
                answer.last(error_response(str(error), "unavailable"))
        return None

    def _forward(self, request, answer):
        if request.stop:
            self._stop(request.request_id, answer)
            return
        params = _engine_params(request)
        with self._lock:
            self._next_id += 1
            number = self._next_id
            self._open[number] = Open(request=request, answer=answer, arrival_ns=time.time_ns())
        message = {"op": "generate", "id": number, "text_input": request.text_input, "params": params}
        try:
            self._engine.send(message)
        except EngineFailed:
            # Whoever takes it out of the table answers it: this call, or on_death in the reader thread.
            if self._take(number) is not None:
                raise

    def _stop(self, request_id, answer):
        if not request_id:
            raise BadRequest("stop needs the id of the request that is to end")
        for number, entry in self._snapshot():
            if entry.request.request_id == request_id:
                self._cancel(number, entry)
        answer.last(text_response(""))

    def _on_message(self, message):
        number = message.get("id")
        if message.get("op") == "error":
            entry = self._take(number)
            if entry is not None:
                response = error_response(message.get("message", ""), message.get("kind", "internal"))
                entry.answer.last(response)
        elif message.get("op") == "chunk":
            self._on_chunk(number, message)

    def _on_chunk(self, number, message):
        reason = message.get("finish_reason")
        with self._lock:
            entry = self._open.pop(number, None) if reason else self._open.get(number)
        if entry is None:
            return
        if message["token_ids"] and not entry.first_ns:
            entry.first_ns = time.time_ns()
        if reason == "cancelled":
            entry.answer.last(error_response("the request was cancelled", "cancelled"))
        elif not entry.request.streaming:
            entry.pieces.append(message["text"])
            if reason:
                entry.answer.last(text_response("".join(entry.pieces), **_extras(entry, reason)))
        elif reason:
            entry.answer.last(text_response(message["text"], **_extras(entry, reason)))
        elif message["text"]:
            # A token can end inside a UTF-8 character: its text comes with a later one.
            entry.answer.piece(text_response(message["text"]))

    def _on_death(self, reason):
        with self._lock:
            entries, self._open = list(self._open.values()), {}
        for entry in entries:
            response = error_response(f"{reason} while it worked on this request", "unavailable")
            entry.answer.last(response)

    def _watch_cancellations(self):
        while not self._finalizing.wait(self._period_s):
            for number, entry in self._snapshot():
                if not entry.cancelling and entry.answer.is_cancelled():
                    self._cancel(number, entry)

    def _cancel(self, number, entry):
        entry.cancelling = True
        try:
            self._engine.send({"op": "cancel", "id": number})
        except EngineFailed as error:
            pb_utils.Logger.log_warn(f"request {number} could not be cancelled: {error}")

    def _snapshot(self):
        with self._lock:
            return list(self._open.items())

    def _take(self, number):
        with self._lock:
            return self._open.pop(number, None)

    def finalize(self):
        self._finalizing.set()
        self._engine.stop()
        self._on_death("the model was unloaded")


def _engine_params(request):
    """``params`` for the engine process; BadRequest for what it cannot do."""
    params = dict(request.params)
    for name, neutral in NEUTRAL.items():
        if params.pop(name, neutral) != neutral:
            raise BadRequest(f"sampling_param_{name} is not supported by target local; leave it out")
    for name in ("return_cumulative_logprob", "return_stop_reason"):
        if getattr(request, name):
            raise BadRequest(f"{name} is not supported by target local")
    params.pop("return_perf_metrics", None)
    return params


def _extras(entry, reason):
    extra = {"finish_reason": reason} if entry.request.return_finish_reason else {}
    if entry.request.params.get("return_perf_metrics"):
        now = time.time_ns()
        extra["arrival_time_ns"] = entry.arrival_ns
        extra["first_token_time_ns"] = entry.first_ns or now
        extra["last_token_time_ns"] = now
    return extra
