"""Triton over gRPC streaming: one stream for each request, ended by its sender, so that its end is the answer's."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

from toolchain.bench.targets.base import (
    About,
    Piece,
    Request,
    RequestError,
    TargetSpec,
    unusable,
)
from toolchain.bench.targets.triton import TYPES, TritonTarget

REACH_TIMEOUT_S = 10.0
FINAL_AFTER_ERROR_S = 0.5
PACKED = {"INT32": "<i", "UINT64": "<Q", "BOOL": "<?"}
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class TritonGrpc(TritonTarget):
    """Speaks the published service of Triton; the messages of tritonclient, without its conversions per response."""

    def __init__(self, spec: TargetSpec) -> None:
        super().__init__(spec)
        self._channel: Any = None
        self._stub: Any = None

    async def prepare(self) -> About:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        spec = self.spec
        self._channel = grpc.aio.insecure_channel(spec.url, options=OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        try:
            about = await self._stub.ServerMetadata(
                service_pb2.ServerMetadataRequest(), timeout=REACH_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            hint = "start one with `toolchain serve ENGINE`; the gRPC port is wanted, not the HTTP one"
            raise unusable(spec.url, f"no Triton server answers ({error.details()})", hint) from error
        try:
            asked = service_pb2.ModelReadyRequest(name=spec.model)
            ready = (await self._stub.ModelReady(asked, timeout=REACH_TIMEOUT_S)).ready
            named = service_pb2.ModelMetadataRequest(name=spec.model)
            metadata = await self._stub.ModelMetadata(named, timeout=REACH_TIMEOUT_S) if ready else None
        except grpc.aio.AioRpcError as error:
            raise unusable(spec.url, str(error.details())) from error
        if metadata is None:
            raise unusable(spec.url, f"the server has no ready model {spec.model!r}")
        await self.settle([tensor.name for tensor in metadata.inputs])
        return About(name=about.name, version=about.version, model=spec.model, notes=self.inputs.notes(spec))

    async def send(self, request: Request) -> AsyncIterator[Piece]:
        import grpc

        call = self._stub.ModelStreamInfer(_once(self._message(request)))
        try:
            async for response in call:
                received_s = time.perf_counter()
                if response.error_message:
                    await _ended(call)
                    raise RequestError(response.error_message)
                yield _piece(received_s, response.infer_response)
        except grpc.aio.AioRpcError as error:
            raise RequestError(f"{error.code().name}: {error.details()}") from error
        finally:
            call.cancel()  # nothing when the answer has ended

    def _message(self, request: Request) -> Any:
        from tritonclient.grpc import service_pb2

        message = service_pb2.ModelInferRequest(model_name=self.spec.model)
        for name, value in self.inputs.values(request, self.spec).items():
            kind = TYPES[name]
            tensor = message.inputs.add()
            tensor.name, tensor.datatype = name, "BYTES" if kind == "STRING" else kind
            tensor.shape.append(1)
            message.raw_input_contents.append(_raw(kind, value))
        return message

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()


def _raw(kind: str, value: Any) -> bytes:
    """One value as the service wants it: little-endian; strings after their length in four bytes."""
    if kind == "STRING":
        encoded = str(value).encode("utf-8")
        return struct.pack("<I", len(encoded)) + encoded
    return struct.pack(PACKED[kind], value)


def _piece(received_s: float, response: Any) -> Piece:
    text, counts = "", {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=False):
        if tensor.name == "text_output":
            text = _strings(raw)
        elif tensor.name in ("num_input_tokens", "num_output_tokens") and len(raw) == 4:
            counts[tensor.name] = struct.unpack("<i", raw)[0]
    return Piece(received_s, text, counts.get("num_input_tokens"), counts.get("num_output_tokens"))


def _strings(raw: bytes) -> str:
    parts, at = [], 0
    while at + 4 <= len(raw):
        (length,) = struct.unpack_from("<I", raw, at)
        parts.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    return b"".join(parts).decode("utf-8", errors="replace")


async def _ended(call: Any) -> None:
    """Wait for the end of a stream after an error. A stream that is cancelled in the moment in which its request ends
    can keep tritonserver 2.51 from ever unloading the model."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FINAL_AFTER_ERROR_S):
            async for _ in call:
                pass


async def _once(message: Any) -> AsyncIterator[Any]:
    yield message
