"""One request to a model that nobody knows: zeros, or empty strings, in the shapes that the server says it has."""

from __future__ import annotations

from math import prod
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.triton.contract import INPUTS
from toolchain.triton.probes import probe_engine

TIMEOUT_S = 60.0
MAX_ELEMENTS = 2**26
"""Of all inputs together; above that a request is no small trial."""
OURS = {tensor.name: tensor.data_type for tensor in INPUTS if tensor.name in ("text_input", "streaming")}
SEQUENCE_ID = 1


class NotAskable(ToolchainError):
    """The configuration does not tell what a request looks like."""


def ask(grpc_url: str, model: str, *, timeout_s: float = TIMEOUT_S) -> str:
    """How ``model`` was asked. NotAskable where its sizes are free; ToolchainError with what it answered."""
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    try:
        with grpc.InferenceServerClient(grpc_url) as client:
            config = client.get_model_config(model, client_timeout=timeout_s).config
            if _is_ours(config):
                probe_engine(grpc_url, model, timeout_s=timeout_s)
                return "one token of text"
            inputs = [_zeros(config, tensor) for tensor in config.input if not tensor.optional]
            if config.model_transaction_policy.decoupled:
                return _stream(client, model, inputs, timeout_s)
            extra = {}
            if config.HasField("sequence_batching"):
                extra = {"sequence_id": SEQUENCE_ID, "sequence_start": True, "sequence_end": True}
            client.infer(model, inputs, client_timeout=timeout_s, **extra)
    except InferenceServerException as error:
        raise ToolchainError(str(error.message()), code="TC-657") from error
    return f"zeros in {len(inputs)} inputs"


def _is_ours(config: Any) -> bool:
    """Whether it has the tensors of ``contract.py``."""
    from tritonclient.grpc import model_config_pb2

    types = {tensor.name: model_config_pb2.DataType.Name(tensor.data_type) for tensor in config.input}
    return bool(config.model_transaction_policy.decoupled) and all(
        types.get(name) == data_type for name, data_type in OURS.items()
    )


def _zeros(config: Any, tensor: Any) -> Any:
    import numpy as np
    from tritonclient import grpc
    from tritonclient.grpc import model_config_pb2
    from tritonclient.utils import triton_to_np_dtype

    shape = [*([1] if config.max_batch_size > 0 else []), *tensor.dims]
    if any(size < 1 for size in shape):
        raise NotAskable(f"input {tensor.name!r} has free sizes {list(tensor.dims)}", code="TC-658")
    if prod(shape) > MAX_ELEMENTS:
        raise NotAskable(f"input {tensor.name!r} has {prod(shape)} elements", code="TC-658")
    kind = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
    wire = "BYTES" if kind == "STRING" else kind
    value = grpc.InferInput(tensor.name, shape, wire)
    zeros: Any = np.full(shape, b"", dtype=np.object_) if wire == "BYTES" else None
    # BF16 travels from float32 values.
    dtype = np.float32 if wire == "BF16" else triton_to_np_dtype(wire)
    value.set_data_from_numpy(np.zeros(shape, dtype=dtype) if zeros is None else zeros)
    return value


def _stream(client: Any, model: str, inputs: list[Any], timeout_s: float) -> str:
    """The first response of a decoupled model, or its end."""
    import queue

    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    try:
        client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        _, error = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise ToolchainError(f"no answer within {timeout_s:g} s", code="TC-657") from None
    finally:
        client.stop_stream(cancel_requests=True)
    if error is not None:
        raise ToolchainError(str(error.message()), code="TC-657")
    return f"zeros in {len(inputs)} inputs, streamed"
