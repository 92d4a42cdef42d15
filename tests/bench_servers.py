"""A Triton server over gRPC for tests of benchmarks, which answers by a script and notes what it was asked."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.grpc_triton import Script
from toolchain.bench.targets.base import TargetSpec

INPUTS = [
    "text_input",
    "streaming",
    "sampling_param_max_tokens",
    "sampling_param_seed",
    "sampling_param_ignore_eos",
]
COUNTS = ["return_num_input_tokens", "return_num_output_tokens"]


class Triton(Script):
    """The stand-in, and what it says of itself and of its model ``m``."""

    inputs = tuple(INPUTS)

    def __init__(self) -> None:
        super().__init__()
        self.streams: queue.Queue[bool] = queue.Queue()
        """Of each stream that is over, whether its answer had come to an end."""

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        whole = threading.Event()
        context.add_callback(lambda: self.streams.put(whole.is_set()))
        yield from super().ModelStreamInfer(requests, context)
        whole.set()

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name="triton", version="2.51.0")

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name == "m")

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        found = service_pb2.ModelMetadataResponse(name=request.name)
        for name in self.inputs:
            found.inputs.add().name = name
        return found


@pytest.fixture
def over_grpc() -> Iterator[tuple[Triton, TargetSpec]]:
    script, server = Triton(), grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield script, TargetSpec(kind="triton-grpc", url=f"127.0.0.1:{port}", model="m", seed=7)
    server.stop(None)
