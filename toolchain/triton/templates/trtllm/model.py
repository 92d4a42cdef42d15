"""Triton model of target trtllm: TensorRT-LLM's LLM API behind the published ``llmapi`` inputs and outputs.

Reads 1/model.yaml (or the file that LLM_CONFIG_PATH names): LLM() arguments, and ``triton_config`` with
max_batch_size, decoupled and cancellation_check_period_ms. Streaming answers hold the new piece of text each,
as target local does.
"""

import asyncio
import json
import os
import queue
import threading
from dataclasses import dataclass

import triton_python_backend_utils as pb_utils
import yaml
from helpers import Answer, BadRequest, GenerateRequest, error_response, read_request, text_response
from llm_outputs import logprobs_from, requested_outputs

MPI_JOB_PREFIXES = ("OMPI_COMM_WORLD_", "OMPI_UNIVERSE_", "OMPI_MCA_orte_", "ORTE_", "PMIX_", "PMI_")
"""A server started by mpirun hands these on; LLM() starts an MPI job of its own, which they would confuse."""
MPI_SETTINGS = ("PMIX_MCA_",)
"""Settings of the site, not of a job: kept."""


def read_model_yaml():
    """(LLM() arguments, triton_config). Raises TritonModelException."""
    name = os.environ.get("LLM_CONFIG_PATH", "model.yaml")
    path = os.path.join(pb_utils.get_model_dir(), name)
    try:
        with open(path, encoding="utf-8") as handle:
            document = yaml.safe_load(handle)
        triton_config = document.pop("triton_config")
        int(triton_config["max_batch_size"])
        decoupled = triton_config["decoupled"]
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise pb_utils.TritonModelException(
            f"{path}: expected LLM() arguments and triton_config {{max_batch_size, decoupled}}: {error!r}"
        ) from error
    if decoupled is not True:
        raise pb_utils.TritonModelException(
            f"{path}: triton_config.decoupled is {decoupled!r}, expected true"
        )
    return document, triton_config


@dataclass
class Running:
    """A request that the LLM is working on."""

    request: GenerateRequest
    answer: Answer
    result: object


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        _, triton_config = read_model_yaml()
        auto_complete_model_config.set_max_batch_size(int(triton_config["max_batch_size"]))
        auto_complete_model_config.set_model_transaction_policy(
            {"decoupled": bool(triton_config["decoupled"])}
        )
        return auto_complete_model_config

    def initialize(self, args):
        llm_args, triton_config = read_model_yaml()
        self._period_s = int(triton_config.get("cancellation_check_period_ms", 100)) / 1000.0
        model = str(llm_args.get("model", ""))
        if os.path.isabs(model) and not os.path.isdir(model):
            raise pb_utils.TritonModelException(
                f"{model} does not exist; this repository was rendered for another place: "
                "run `toolchain triton` again"
            )
        if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
            raise pb_utils.TritonModelException(
                "started by mpirun with several ranks: start one tritonserver, LLM() starts the ranks itself"
            )
        for key in list(os.environ):
            if key.startswith(MPI_JOB_PREFIXES) and not key.startswith(MPI_SETTINGS):
                del os.environ[key]
        llm_args.update(_choose_gpus(json.loads(args["model_config"]), args.get("model_instance_name", "")))
        self._running = {}
        self._lock = threading.Lock()
        self._finalizing = threading.Event()
        self._outbox = queue.Queue()
        self._start(llm_args)
        self._threads = [
            threading.Thread(target=self._send_answers),
            threading.Thread(target=self._watch_cancellations),
        ]
        for thread in self._threads:
            thread.start()

    def _start(self, llm_args):
        """Start the LLM inside the thread whose event loop will read its answers: it binds its queues to that
        loop."""
        # Imported only now: tensorrt_llm opens the GPUs, which CUDA_VISIBLE_DEVICES must have chosen before.
        from tensorrt_llm import LLM, SamplingParams

        self._sampling_params = SamplingParams
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self._loop.run_forever)
        self._loop_thread.start()

        async def make():
            return await self._loop.run_in_executor(None, lambda: LLM(**_typed(llm_args)))

        try:
            self._llm = asyncio.run_coroutine_threadsafe(make(), self._loop).result()
        except Exception as error:
            self._end_loop()
            raise pb_utils.TritonModelException(f"LLM() failed: {error!r}") from error

    def execute(self, requests):
        for request in requests:
            answer = Answer(request)
            try:
                parsed = read_request(request)
                if parsed.stop:
                    self._stop(parsed.request_id, answer)
                    continue
            except BadRequest as error:
                self._outbox.put((answer.last, error_response(str(error), "invalid_argument")))
                continue
            asyncio.run_coroutine_threadsafe(self._generate(parsed, answer), self._loop)

    async def _generate(self, request, answer):
        """Drive one generation; every way out puts a last response into the outbox."""
        try:
            params = dict(request.params)
            if request.return_cumulative_logprob:
                # Without log probabilities the LLM adds up none.
                params.setdefault("logprobs", 1)
            params = self._sampling_params(**params)
            result = self._llm.generate_async(request.text_input, params, streaming=request.streaming)
        except (TypeError, ValueError) as error:
            self._outbox.put((answer.last, error_response(str(error), "invalid_argument")))
            return
        running = Running(request=request, answer=answer, result=result)
        with self._lock:
            self._running[id(running)] = running
        try:
            last = await self._forward(running)
        except Exception as error:  # noqa: BLE001 - or the client would wait for ever
            last = error_response(f"generation failed: {error!r}")
        self._finish(running, last)

    async def _forward(self, running):
        """Send the pieces; the last response is returned."""
        sent = told = 0
        request = running.request
        async for output in running.result:
            completion = output.outputs[0]
            # ``text`` is all text so far, ``token_ids`` and ``logprobs`` hold all tokens.
            piece, extra = completion.text[sent:], {}
            if not output.finished and not (request.streaming and piece):
                continue
            if "logprobs" in request.params:
                extra["logprobs"] = logprobs_from(
                    completion, told, request.params["logprobs"], self._llm.tokenizer
                )
                told = len(completion.token_ids)
            if output.finished:
                return text_response(piece, **extra, **requested_outputs(output, request))
            sent += len(piece)
            self._outbox.put((running.answer.piece, text_response(piece, **extra)))
        return error_response("the LLM ended the answer without finishing it")

    def _finish(self, running, response):
        with self._lock:
            self._running.pop(id(running), None)
        self._outbox.put((running.answer.last, response))

    def _send_answers(self):
        """In a thread of its own: sending waits for the server, and the event loop must not wait."""
        while (item := self._outbox.get()) is not None:
            send, response = item
            send(response)

    def _watch_cancellations(self):
        while not self._finalizing.wait(self._period_s):
            for running in self._snapshot():
                if running.answer.is_cancelled():
                    self._cancel(running)

    def _stop(self, request_id, answer):
        if not request_id:
            raise BadRequest("stop needs the id of the request that is to end")
        for running in self._snapshot():
            if running.request.request_id == request_id:
                self._cancel(running)
        self._outbox.put((answer.last, text_response("")))

    def _cancel(self, running):
        running.result.abort()
        self._finish(running, error_response("the request was cancelled", "cancelled"))

    def _snapshot(self):
        with self._lock:
            return list(self._running.values())

    def finalize(self):
        self._finalizing.set()
        for running in self._snapshot():
            self._cancel(running)
        self._llm.shutdown()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._end_loop()

    def _end_loop(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop_thread.join()
        self._loop.close()


def _choose_gpus(config, instance_name):
    """Give this instance its GPUs and return the LLM() arguments that follow from it."""
    lists = config.get("parameters", {}).get("gpu_device_ids", {}).get("string_value", "")
    groups = config.get("instance_group") or [{}]
    count = sum(int(group.get("count", 1)) for group in groups)
    if not lists:
        if count > 1:
            raise pb_utils.TritonModelException(f"{count} instances need gpu_device_ids, such as 0,1;2,3")
        return {}
    per_instance = lists.split(";")
    suffix = instance_name.rsplit("_", 1)[-1]
    index = int(suffix) if suffix.isdigit() else 0
    if index >= len(per_instance):
        raise pb_utils.TritonModelException(f"gpu_device_ids {lists!r} has no entry for instance {index}")
    gpus = per_instance[index].replace(" ", "")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    # The MPI workers that LLM() spawns take theirs from this one.
    os.environ["TRTLLM_VISIBLE_DEVICES"] = gpus
    return {"gpus_per_node": len(gpus.split(","))}


def _typed(llm_args):
    """Nested mappings as the typed arguments that older versions want; newer ones convert by themselves."""
    try:
        from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict
    except ImportError:
        return llm_args
    return update_llm_args_with_extra_dict({}, llm_args)
