"""Requests and responses of the ``tensorrt_llm`` model as protobuf messages, without numpy in between.

A streamed answer is one message for each token, so what happens here is the endpoint's own cost per token.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2

from toolchain.triton.contract import INPUTS

_TYPES = {
    "TYPE_BOOL": ("BOOL", struct.Struct("<?")),
    "TYPE_INT32": ("INT32", struct.Struct("<i")),
    "TYPE_UINT64": ("UINT64", struct.Struct("<Q")),
    "TYPE_FP32": ("FP32", struct.Struct("<f")),
}
"""config.pbtxt type -> (type on the wire, its little-endian bytes)."""
_KINDS = {tensor.name: tensor.data_type for tensor in INPUTS}
_LENGTH = struct.Struct("<I")
_INT32 = struct.Struct("<i")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One response of the model."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: tuple[dict[str, Any], ...] = ()
    """One object per token of this piece, as the contract describes it."""
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None


def infer_request(
    model: str, request_id: str, inputs: Mapping[str, Any], *, timeout_s: float | None = None
) -> Any:
    """``ModelInferRequest`` of ``inputs``: by their names in the contract; a str or list of str, or a number.

    ``timeout_s``: after which the model shall end the request by itself.
    """
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    if timeout_s is not None:
        request.parameters["timeout"].int64_param = int(timeout_s * 1e6)
    for name, value in inputs.items():
        if _KINDS[name] == "TYPE_STRING":
            texts = [value] if isinstance(value, str) else value
            datatype, shape = "BYTES", [len(texts)]
            encoded = [text.encode("utf-8") for text in texts]
            raw = b"".join(_LENGTH.pack(len(item)) + item for item in encoded)
        else:
            datatype, packing = _TYPES[_KINDS[name]]
            shape, raw = [1], packing.pack(value)
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    return request


def is_final(response: Any) -> bool:
    """Whether ``response`` (a ``ModelInferResponse``) is the last one of its request."""
    parameters = response.parameters
    return "triton_final_response" in parameters and parameters["triton_final_response"].bool_param


def read_piece(response: Any) -> Piece | None:
    """What ``response`` holds; None for one without outputs, as the final flag alone is."""
    if not response.outputs:
        return None
    values: dict[str, Any] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=False):
        if output.name == "text_output":
            values["text"] = b"".join(_strings(raw)).decode("utf-8", errors="replace")
        elif output.name == "finish_reason":
            values["finish_reason"] = b"".join(_strings(raw)).decode("utf-8", errors="replace")
        elif output.name == "logprobs":
            values["logprobs"] = tuple(json.loads(item) for item in _strings(raw))
        elif output.name in ("num_input_tokens", "num_output_tokens") and len(raw) >= _INT32.size:
            values[output.name] = _INT32.unpack_from(raw)[0]
    return Piece(**values)


def _strings(raw: bytes) -> list[bytes]:
    """The elements of a BYTES tensor: each behind its length."""
    items, position = [], 0
    while position + _LENGTH.size <= len(raw):
        (length,) = _LENGTH.unpack_from(raw, position)
        position += _LENGTH.size
        items.append(raw[position : position + length])
        position += length
    return items
