"""A server that does nothing: what is measured against it is the load generator, the protocol and this machine.

``python -m toolchain.bench.null_server sse|grpc`` prints its port. It streams as many tokens as were asked for: as fast
as it can, or the first at once and then one in as many milliseconds as the last line on stdin says; each line is
answered with itself. It ends when its stdin closes.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

NAME = "null"
TEXT = " token"
INPUTS = (
    "text_input",
    "streaming",
    "sampling_param_max_tokens",
    "sampling_param_seed",
    "sampling_param_ignore_eos",
)
"""Of the model as Triton tells them."""


class Pace:
    """Seconds between two tokens, for the requests that come next."""

    period_s = 0.0


PACE = Pace()


async def paced(count: int) -> AsyncIterator[int]:
    """0 to ``count`` - 1, one in every period, each due at its own time so that delays do not add up."""
    started_s, period_s = time.perf_counter(), PACE.period_s
    for index in range(count):
        if period_s:
            left = started_s + index * period_s - time.perf_counter()
            if left > 0:
                await asyncio.sleep(left)
        yield index


async def serve_sse() -> tuple[int, Any]:
    """Triton's generate_stream, and OpenAI's completions and chat completions."""
    from aiohttp import web

    async def generate_stream(request: Any) -> Any:
        body = await request.json()
        event = f'data: {{"model_name":"{NAME}","text_output":"{TEXT}"}}\n\n'.encode()
        return await _stream(request, body["sampling_param_max_tokens"], event, b"")

    async def completions(request: Any) -> Any:
        body = await request.json()
        chat = "messages" in body
        choice = {"index": 0, "finish_reason": None} | (
            {"delta": {"content": TEXT}} if chat else {"text": TEXT}
        )
        # aiperf reads no event without its kind.
        chunk = {"object": "chat.completion.chunk" if chat else "text_completion", "choices": [choice]}
        event = f"data: {json.dumps(chunk)}\n\n".encode()
        count = body["max_tokens"]
        usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": count}}
        end = f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode()
        return await _stream(request, count, event, end)

    async def model(request: Any) -> Any:
        return web.json_response({"name": NAME, "inputs": [{"name": name} for name in INPUTS]})

    async def server(request: Any) -> Any:
        return web.json_response({"name": NAME, "version": ""})

    app = web.Application(client_max_size=1 << 30)
    app.router.add_get("/v2", server)
    app.router.add_get("/v2/models/{model}", model)
    app.router.add_post("/v2/models/{model}/generate_stream", generate_stream)
    app.router.add_get("/v1/models", _models)
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", completions)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner.addresses[0][1], runner


async def _models(request: Any) -> Any:
    from aiohttp import web

    return web.json_response({"data": [{"id": NAME, "owned_by": NAME}]})


async def _stream(request: Any, count: int, event: bytes, end: bytes) -> Any:
    from aiohttp import web

    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    async for _ in paced(count):
        await response.write(event)
    if end:
        await response.write(end)
    await response.write_eof()
    return response


async def serve_grpc() -> tuple[int, Any]:
    """The parts of Triton's service that the generator uses."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
        async def ServerMetadata(self, request: Any, context: Any) -> Any:
            return service_pb2.ServerMetadataResponse(name=NAME)

        async def ModelReady(self, request: Any, context: Any) -> Any:
            return service_pb2.ModelReadyResponse(ready=True)

        async def ModelMetadata(self, request: Any, context: Any) -> Any:
            found = service_pb2.ModelMetadataResponse(name=request.name)
            for name in INPUTS:
                found.inputs.add().name = name
            return found

        async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
            async for request in requests:
                names = [tensor.name for tensor in request.inputs]
                raw = request.raw_input_contents[names.index("sampling_param_max_tokens")]
                answer = service_pb2.ModelStreamInferResponse()
                answer.infer_response.outputs.add().name = "text_output"
                text = TEXT.encode()
                answer.infer_response.raw_output_contents.append(len(text).to_bytes(4, "little") + text)
                async for _ in paced(int.from_bytes(raw, "little")):
                    yield answer

    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return port, server


async def serve(protocol: str) -> None:
    port, _kept = await (serve_grpc() if protocol == "grpc" else serve_sse())
    _say(str(port))
    await asyncio.get_running_loop().run_in_executor(None, _listen)


def _listen() -> None:
    for line in sys.stdin:
        PACE.period_s = float(line) / 1000
        _say(line.strip())


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent ends it
    asyncio.run(serve(sys.argv[1]))
