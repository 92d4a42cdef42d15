"""A gRPC server that stands in for Triton where a test is about the endpoint in front of it: it answers by a script,
stays silent, breaks off or refuses, as the text of the prompt says."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

FORMATS = {"BOOL": "<?", "INT32": "<i", "UINT64": "<Q", "FP32": "<f"}


def read_inputs(request: Any) -> dict[str, Any]:
    """Name -> value, or list of str, of a ModelInferRequest."""
    values: dict[str, Any] = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            texts, position = [], 0
            while position < len(raw):
                (length,) = struct.unpack_from("<I", raw, position)
                texts.append(raw[position + 4 : position + 4 + length].decode())
                position += 4 + length
            values[tensor.name] = texts
        else:
            (values[tensor.name],) = struct.unpack(FORMATS[tensor.datatype], raw)
    return values


def response(request_id: str, *, final: bool = False, **outputs: Any) -> Any:
    """One streamed response; str and list of str become BYTES, int INT32."""
    message = service_pb2.ModelStreamInferResponse()
    found = message.infer_response
    found.model_name, found.id = "tensorrt_llm", request_id
    found.parameters["triton_final_response"].bool_param = final
    for name, value in outputs.items():
        if isinstance(value, int):
            found.outputs.add(name=name, datatype="INT32", shape=[1])
            found.raw_output_contents.append(struct.pack("<i", value))
        else:
            texts = [item.encode() for item in ([value] if isinstance(value, str) else value)]
            found.outputs.add(name=name, datatype="BYTES", shape=[len(texts)])
            found.raw_output_contents.append(b"".join(struct.pack("<I", len(text)) + text for text in texts))
    return message


def failure(message: str) -> Any:
    return service_pb2.ModelStreamInferResponse(error_message=message)


class Script(service_pb2_grpc.GRPCInferenceServiceServicer):
    """What a prompt begins with decides: ``error:TEXT`` is refused with TEXT, ``midway:TEXT`` after one piece,
    ``once:TEXT`` the first time only, ``silent`` never answers, ``stall`` stops after one piece, ``cut`` ends the
    stream, ``garbled`` has log probabilities that are no JSON, ``endless`` goes on until it is stopped, ``flood`` with
    much text, ``slow:TEXT`` takes its time; any other prompt is answered word by word. A ``stop`` is answered as our
    models do: the request ends with an error."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.models: list[str] = []
        """The model that each of them was for."""
        self.busy = False
        """Probes get no row."""
        self.stopped: list[str] = []
        """Ids that a ``stop`` input named."""
        self.cancelled = threading.Event()
        """A client cancelled a stream."""
        self.sent = 0

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        request = next(requests)
        inputs = read_inputs(request)
        self.requests.append(inputs)
        self.models.append(request.model_name)
        stopped, over = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, args=(requests, stopped, over), daemon=True).start()
        context.add_callback(lambda: None if over.is_set() else self.cancelled.set())
        for message in self._play(request.id, inputs, stopped):
            self.sent += 1
            yield message
        if not inputs["text_input"][0].startswith("cut"):
            over.wait(10)

    def _listen(self, requests: Iterator[Any], stopped: threading.Event, over: threading.Event) -> None:
        try:
            for request in requests:
                if read_inputs(request).get("stop"):
                    self.stopped.append(request.id)
                    stopped.set()
        except grpc.RpcError:
            return
        over.set()

    def _play(self, request_id: str, inputs: dict[str, Any], stopped: threading.Event) -> Iterator[Any]:
        (prompt,) = inputs["text_input"]
        kind, _, rest = prompt.partition(":")
        if kind == "error" or (kind == "once" and self.requests.count(inputs) == 1):
            yield failure(rest)
        elif kind == "midway":
            yield response(request_id, text_output="one ")
            yield failure(rest)
        elif kind == "garbled":
            yield response(request_id, text_output="one ", logprobs="{no JSON")
        elif kind == "silent" or (kind == "probe" and self.busy):
            stopped.wait(30)
            yield failure("the request was cancelled")
        elif kind == "stall":
            yield response(request_id, text_output="one ")
            stopped.wait(30)
            yield failure("the request was cancelled")
        elif kind == "cut":
            yield response(request_id, text_output="one ")
        elif kind in ("endless", "flood"):
            while not stopped.wait(0.001):
                yield response(request_id, text_output="again " * (20 if kind == "endless" else 20_000))
            yield failure("the request was cancelled")
        else:
            yield from self._words(request_id, inputs, prompt)

    def _words(self, request_id: str, inputs: dict[str, Any], prompt: str) -> Iterator[Any]:
        words = [f"{word} " for word in prompt.split()] or [" "]
        end = {"finish_reason": "stop", "num_input_tokens": len(prompt), "num_output_tokens": len(words)}
        if not inputs["streaming"]:
            extra = self._probabilities(inputs, words) | end
            yield response(request_id, final=True, text_output="".join(words), **extra)
            return
        for number, word in enumerate(words):
            last = number == len(words) - 1
            extra = self._probabilities(inputs, [word]) | (end if last else {})
            if prompt.startswith("slow:"):
                time.sleep(0.03)
            yield response(request_id, final=last, text_output=word, **extra)

    def _probabilities(self, inputs: dict[str, Any], words: list[str]) -> dict[str, Any]:
        count = inputs.get("sampling_param_logprobs")
        if count is None:
            return {}
        named = [
            {"token_id": 1, "token": word, "bytes": list(word.encode()), "logprob": -0.5} for word in words
        ]
        return {"logprobs": [json.dumps({**token, "top": [token] * count}) for token in named]}


class GrpcTriton:
    """The server; ``script`` tells what it saw."""

    def __init__(self) -> None:
        self.script = Script()
        self._server = grpc.server(ThreadPoolExecutor(64))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self.script, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stop(None).wait(5)

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self._port}"

    def stop(self) -> None:
        """Gone, as a server that was killed."""
        self._server.stop(None).wait(5)


def wait_until(condition: Any, what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.01)
