"""Loads and unloads a model of a running tritonserver, which must run in explicit model control mode."""

from __future__ import annotations

from toolchain.core.errors import ToolchainError

UNLOAD_TIMEOUT_S = 30.0


def load_model(grpc_url: str, model: str, *, timeout_s: float) -> None:
    """Load what the model's version policy asks for and return when it is loaded. ToolchainError TC-631.

    Versions that are loaded go on serving meanwhile; one that another takes the place of is unloaded once the new one
    is ready. When the load fails, what served before goes on serving.
    """
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    try:
        with grpc.InferenceServerClient(grpc_url) as client:
            client.load_model(model, client_timeout=timeout_s)
    except InferenceServerException as error:
        raise ToolchainError(f"{model} could not be loaded: {error.message()}", code="TC-631") from error


def unload_model(grpc_url: str, model: str) -> None:
    """Ask for all versions of ``model`` to be unloaded; requests that run may end. ToolchainError TC-631."""
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    try:
        with grpc.InferenceServerClient(grpc_url) as client:
            client.unload_model(model, client_timeout=UNLOAD_TIMEOUT_S)
    except InferenceServerException as error:
        raise ToolchainError(f"{model} could not be unloaded: {error.message()}", code="TC-631") from error
