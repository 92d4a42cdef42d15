"""Status of a server that another program runs: Triton over gRPC or HTTP, or an OpenAI-compatible endpoint."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.triton.probes import probe_engine, read_index


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    name: str
    version: str
    healthy: bool
    note: str
    """What was answered, or why not."""


@dataclass(frozen=True, kw_only=True)
class ForeignStatus:
    url: str
    kind: str
    """``triton-grpc``, ``triton-http`` or ``openai``."""
    models: tuple[ForeignModel, ...]

    @property
    def healthy(self) -> bool:
        return bool(self.models) and all(model.healthy for model in self.models)


def foreign_status(address: str, *, timeout_s: float = 10.0) -> ForeignStatus:
    """Ask ``address`` (HOST:PORT or a URL) what it is and each of its models for one token.

    UsageError TC-635 for what is no address, ToolchainError TC-633 when nothing known answers there.
    """
    bare = address.split("://", 1)[-1].rstrip("/")
    host, _, port = bare.partition("/")[0].rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"{address!r} is no address; expected HOST:PORT or http://HOST:PORT", code="TC-635")
    for ask in (_openai, _triton_http):
        found = ask(address if "://" in address else f"http://{bare}", timeout_s)
        if found is not None:
            return found
    return _triton_grpc(f"{host}:{port}", timeout_s)


def _triton_grpc(url: str, timeout_s: float) -> ForeignStatus:
    models = []
    for item in read_index(url, timeout_s=timeout_s):
        if item.state != "READY":
            continue
        try:
            seconds = probe_engine(url, item.model, timeout_s=timeout_s, version=str(item.version))
            note, healthy = f"one token in {seconds * 1000:.1f} ms", True
        except ToolchainError as error:
            note, healthy = error.message, False
        models.append(ForeignModel(name=item.model, version=str(item.version), healthy=healthy, note=note))
    return ForeignStatus(url=url, kind="triton-grpc", models=tuple(models))


def _triton_http(url: str, timeout_s: float) -> ForeignStatus | None:
    import requests

    base = url.rstrip("/")
    try:
        if "name" not in requests.get(f"{base}/v2", timeout=timeout_s).json():
            return None
        index = requests.post(f"{base}/v2/repository/index", timeout=timeout_s).json()
    except (requests.RequestException, ValueError, TypeError):
        return None
    models = []
    for item in index:
        if item.get("state") != "READY":
            continue
        body = {"text_input": "probe", "sampling_param_max_tokens": 1}
        try:
            path = f"{base}/v2/models/{item['name']}/versions/{item['version']}/generate"
            answer = requests.post(path, json=body, timeout=timeout_s)
            told = answer.json()
            healthy = answer.status_code == 200 and "error" not in told
            note = "one token" if healthy else str(told.get("error", f"HTTP {answer.status_code}"))
        except (requests.RequestException, ValueError) as error:
            note, healthy = str(error), False
        models.append(ForeignModel(name=item["name"], version=item["version"], healthy=healthy, note=note))
    return ForeignStatus(url=base, kind="triton-http", models=tuple(models))


def _openai(url: str, timeout_s: float) -> ForeignStatus | None:
    import os

    import requests

    base = url.rstrip("/").removesuffix("/v1")
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        listed = requests.get(f"{base}/v1/models", timeout=timeout_s, headers=headers)
        told = listed.json()
        if listed.status_code == 401:
            raise ToolchainError(f"{base} wants an API key", hint="put it into OPENAI_API_KEY", code="TC-633")
        names = [item["id"] for item in told["data"]]
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return None
    models = []
    for name in names:
        body = {"model": name, "prompt": "probe", "max_tokens": 1}
        try:
            answer = requests.post(f"{base}/v1/completions", json=body, timeout=timeout_s, headers=headers)
            healthy = answer.status_code == 200
            note = "one token" if healthy else f"HTTP {answer.status_code}: {answer.text[:200]}"
        except requests.RequestException as error:
            note, healthy = str(error), False
        models.append(ForeignModel(name=name, version="", healthy=healthy, note=note))
    return ForeignStatus(url=f"{base}/v1", kind="openai", models=tuple(models))
