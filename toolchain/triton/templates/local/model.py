"""Triton model of target local: forwards requests to the engine process, which batches them, and its answers
back.

Decoupled: ``execute`` returns at once, answers are sent from the reader thread as they come. With
``streaming`` each piece of text is one response; without, one response holds the whole text.
"""

import json
import os
import threading
import time

import triton_python_backend_utils as pb_utils
from engine_process import EngineFailed, EngineProcess
from helpers import Answer, BadRequest, error_response, read_request, text_response
from instance_gpus import choose_gpus
from metrics import Metrics
from open_request import OpenRequest, engine_message
from senders import Senders

CANCELLATION_CHECKS = 32
"""Requests that are asked in one period whether their client has gone; each costs a message to the server (60 us)."""
OVERDUE_S = 1.0
"""How much later than the engine process this model ends a request whose timeout has passed."""
OPTIONS = (
    *("max_waiting", "max_waiting_tokens", "max_queue_s", "warmup_requests"),
    *("kernels", "kv_cache", "kv_layout"),
)
"""Keys of served.json that are options of the engine process, where they are given."""


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
        choose_gpus(args)
        self._open = {}
        self._lock = threading.Lock()
        self._next_id = 0
        self._waiting = 0
        self._finalizing = threading.Event()
        labels = {"model": args.get("model_name", ""), "version": args.get("model_version", "")}
        if "model_instance_name" in args:  # each instance has an engine, and a gauge, of its own
            labels["instance"] = args["model_instance_name"]
        self._metrics = Metrics(labels, self._load)
        self._senders = Senders(self._on_item, pb_utils.Logger.log_error)
        self._engine = EngineProcess(
            [python, "-m", "toolchain.runtime.worker", engine_dir, *_options(served)],
            ready_timeout_s=float(served.get("ready_timeout_s", 1800)),
            on_message=self._on_message,
            on_death=self._on_death,
            log=pb_utils.Logger.log_error,
        )
        try:
            self._engine.start()
        except EngineFailed as error:
            self._metrics.close()
            raise pb_utils.TritonModelException(f"the engine {engine_dir} did not start: {error}") from error
        self._period_s = float(served.get("cancellation_check_period_ms", 100)) / 1000.0
        threading.Thread(target=self._watch, daemon=True).start()

    def execute(self, requests):
        for request in requests:
            answer = Answer(request)
            try:
                self._forward(read_request(request), answer)
            except BadRequest as error:
                self._end(answer, str(error), "invalid_argument")
            except EngineFailed as error:
                self._end(answer, f"TC-514: {error}", "unavailable")
        return None

    def _forward(self, request, answer):
        if request.stop:
            self._stop(request.request_id, answer)
            return
        message = engine_message(request, self._engine.ready.get("max_prompt_bytes"))
        with self._lock:
            self._next_id += 1
            number = self._next_id
            self._open[number] = OpenRequest(request, answer)
        try:
            self._engine.send({**message, "id": number})
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
        """``chunks``: what the engine has to say after one step, about all requests in it; or a single ``error``."""
        self._waiting = message.get("waiting", self._waiting)
        now = time.time_ns()
        items = message.get("chunks") or [message]
        for item in items:
            item["now"] = now
        self._senders.send([item for item in items if "id" in item])

    def _on_item(self, item):
        """One chunk or error."""
        number, reason = item["id"], item.get("finish_reason")
        error = item.get("op") == "error"
        with self._lock:
            entry = self._open.pop(number, None) if reason or error else self._open.get(number)
        if entry is None:
            return
        if error:
            self._end(entry.answer, item.get("message", ""), item.get("kind", "internal"))
            return
        entry.take(item, item["now"], self._metrics)
        if reason == "cancelled":
            self._end(entry.answer, "the request was cancelled", "cancelled")
        elif reason:
            self._metrics.count("toolchain_requests_total", outcome=reason)
            entry.answer.last(text_response(item["text"], **entry.last_outputs(item)))
        elif item["text"]:
            # A token can end inside a UTF-8 character: its text comes with a later one.
            entry.answer.piece(text_response(item["text"], **entry.outputs(item)))

    def _on_death(self, reason):
        self._metrics.count("toolchain_engine_restarts_total")
        self._fail_open(f"{reason} while it worked on this request")

    def _fail_open(self, message):
        with self._lock:
            entries, self._open, self._waiting = list(self._open.values()), {}, 0
        for entry in entries:
            self._end(entry.answer, f"TC-514: {message}", "unavailable")

    def _end(self, answer, message, kind):
        """Answer with an error."""
        self._metrics.count("toolchain_requests_total", outcome=kind)
        answer.last(error_response(message, kind))

    def _watch(self):
        """Find clients that have gone, in turns, and requests that the engine process should have ended."""
        turn = 0
        while not self._finalizing.wait(self._period_s):
            entries = self._snapshot()
            for number, entry in entries:
                if entry.overdue(OVERDUE_S) and self._take(number) is not None:
                    self._cancel(number, entry)
                    text = (
                        f"TC-513: the request did not end within its timeout of {entry.request.timeout_s:g} s"
                    )
                    self._end(entry.answer, text, "cancelled")
            turn = turn if turn < len(entries) else 0
            for number, entry in entries[turn : turn + CANCELLATION_CHECKS]:
                if not entry.cancelling and entry.answer.is_cancelled():
                    self._cancel(number, entry)
            turn += CANCELLATION_CHECKS

    def _cancel(self, number, entry):
        entry.cancelling = True
        try:
            self._engine.send({"op": "cancel", "id": number})
        except EngineFailed as error:
            pb_utils.Logger.log_warn(f"request {number} could not be cancelled: {error}")

    def _load(self):
        """(running, waiting): the engine process says with its chunks how many wait."""
        with self._lock:
            waiting = min(self._waiting, len(self._open))
            return len(self._open) - waiting, waiting

    def _snapshot(self):
        with self._lock:
            return list(self._open.items())

    def _take(self, number):
        with self._lock:
            return self._open.pop(number, None)

    def finalize(self):
        self._finalizing.set()
        self._engine.stop()
        self._fail_open("the model was unloaded")
        self._senders.close()
        self._metrics.close()


def _options(served):
    """Command line of the engine process for what served.json names."""
    options = []
    for name in OPTIONS:
        if served.get(name) is not None:
            options += [f"--{name.replace('_', '-')}", str(served[name])]
    return options
