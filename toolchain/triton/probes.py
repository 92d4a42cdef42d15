"""Questions to a running tritonserver: is this model's stub there, does its engine generate, has it done so lately?"""

from __future__ import annotations

import time
from dataclasses import dataclass

from toolchain.core.errors import ToolchainError
from toolchain.triton.client import GenerateClient

NOBODY = "toolchain-probe"
"""An id that no request has: to stop it is answered by the stub at once, even when the engine has much to do."""
REQUEST_METRICS = {
    "toolchain_requests_running": "running",
    "toolchain_requests_waiting": "waiting",
    "toolchain_generated_tokens": "generated_tokens",
    "toolchain_generated_tokens_total": "generated_tokens",
}


@dataclass(kw_only=True)
class ModelLoad:
    """What a model does, from Triton's /metrics; summed over versions and instances.

    Target local tells it once a second; of others it stays 0. Triton's own nv_inference_count says nothing about an
    engine: it counts requests of a decoupled model when they come, also those that nobody answers.
    """

    running: int = 0
    waiting: int = 0
    generated_tokens: int = 0


def probe_stub(grpc_url: str, model: str, *, timeout_s: float) -> float:
    """Seconds that the stub took to answer a request that needs no engine. RequestFailed when it does not."""
    started = time.monotonic()
    with GenerateClient(grpc_url, model=model) as client:
        for _ in client.stream("", timeout_s=timeout_s, stop=True, request_id=NOBODY):
            pass
    return time.monotonic() - started


def probe_engine(grpc_url: str, model: str, *, timeout_s: float, version: str = "") -> float:
    """Seconds that one generated token took; waits in the queue like any request. RequestFailed."""
    started = time.monotonic()
    with GenerateClient(grpc_url, model=model, version=version) as client:
        for _ in client.stream("probe", timeout_s=timeout_s, sampling_param_max_tokens=1):
            pass
    return time.monotonic() - started


def read_load(metrics_url: str, *, timeout_s: float = 2.0) -> dict[str, ModelLoad]:
    """The load of every model by name; ToolchainError TC-633 when the metrics cannot be had."""
    import requests
    from prometheus_client.parser import text_string_to_metric_families

    loads: dict[str, ModelLoad] = {}
    try:
        text = requests.get(metrics_url, timeout=timeout_s).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = REQUEST_METRICS.get(sample.name)
                if name is not None and "model" in sample.labels:
                    load = loads.setdefault(sample.labels["model"], ModelLoad())
                    setattr(load, name, getattr(load, name) + int(sample.value))
    except (requests.RequestException, ValueError) as error:
        raise ToolchainError(f"no metrics from {metrics_url}: {error}", code="TC-633") from error
    return loads


@dataclass(frozen=True, kw_only=True)
class VersionState:
    model: str
    version: int
    state: str
    """READY, LOADING, UNLOADING, UNAVAILABLE."""
    reason: str


def read_index(grpc_url: str, *, timeout_s: float = 5.0) -> list[VersionState]:
    """The repository index, one entry for each version that Triton knows of; ToolchainError TC-633."""
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    try:
        with grpc.InferenceServerClient(grpc_url) as client:
            index = client.get_model_repository_index(client_timeout=timeout_s)
    except InferenceServerException as error:
        raise ToolchainError(
            f"no repository index from {grpc_url}: {error.message()}", code="TC-633"
        ) from error
    return [
        VersionState(model=item.name, version=int(item.version or 0), state=item.state, reason=item.reason)
        for item in index.models
    ]


def ready_versions(grpc_url: str, model: str, *, timeout_s: float = 5.0) -> list[int]:
    """Numbers of the versions of ``model`` that are READY, oldest first."""
    index = read_index(grpc_url, timeout_s=timeout_s)
    return sorted(item.version for item in index if item.model == model and item.state == "READY")
