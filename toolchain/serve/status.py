"""``toolchain status``: the servers that ``toolchain serve`` runs on this machine, each asked now."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.files import read_json, sha256_file
from toolchain.serve.state import ServerState, running_servers
from toolchain.triton.freshness import rendered_for
from toolchain.triton.probes import probe_engine, ready_versions

ASK_TIMEOUT_S = 5.0


@dataclass(kw_only=True)
class ModelStatus:
    name: str
    healthy: bool = False
    """Whether it has answered an inference just now; a busy one: whether its supervision has seen it alive."""
    problem: str = ""
    probe_ms: float | None = None
    """How long one token took now, queue included."""
    versions: list[int] = field(default_factory=list)
    """READY in Triton."""
    engine: str = ""
    """Name of the engine in the newest version."""
    engine_dir: str = ""
    manifest_sha256: str = ""
    """Of its engine.json."""
    recoveries: int = 0
    last_probe: float = 0.0
    """Unix time of the last sign of life that supervision has seen."""
    running: int = 0
    waiting: int = 0
    tokens_per_second: float = 0.0


@dataclass(kw_only=True)
class ServerStatus:
    state: ServerState
    models: list[ModelStatus]
    draining: bool = False
    uptime_s: float = 0.0
    problem: str = ""

    @property
    def healthy(self) -> bool:
        return not self.problem and not self.draining and all(model.healthy for model in self.models)


def servers_status(*, probe_timeout_s: float = 10.0) -> list[ServerStatus]:
    """Every server of this user on this machine, oldest first; empty when none runs."""
    return [_server(state, probe_timeout_s) for state in running_servers()]


def _server(state: ServerState, probe_timeout_s: float) -> ServerStatus:
    import requests

    try:
        told = requests.get(f"{state.status}/status", timeout=ASK_TIMEOUT_S).json()
    except (requests.RequestException, ValueError) as error:
        return ServerStatus(state=state, models=[], problem=f"its status endpoint does not answer: {error}")
    models = [_model(state, item, probe_timeout_s) for item in told["models"]]
    return ServerStatus(state=state, models=models, draining=told["draining"], uptime_s=told["uptime_s"])


def _model(state: ServerState, told: dict[str, Any], probe_timeout_s: float) -> ModelStatus:
    known = ("name", "recoveries", "last_probe", "running", "waiting", "tokens_per_second")
    status = ModelStatus(**{key: told[key] for key in known})
    _name_engine(status, Path(state.repository) / status.name)
    try:
        status.versions = ready_versions(state.grpc, status.name)
        seconds = probe_engine(state.grpc, status.name, timeout_s=probe_timeout_s)
        status.probe_ms = round(seconds * 1000, 1)
        status.healthy = True
    except ToolchainError as error:
        # A full queue makes a probe late; supervision knows whether the others get their tokens.
        status.healthy = bool(told["up"]) and "did not finish" in error.message and status.waiting > 0
        status.problem = error.message
    return status


def _name_engine(status: ModelStatus, model_dir: Path) -> None:
    """Fill in the engine; what cannot be read stays empty, as for an engine that was removed since."""
    try:
        target, path = rendered_for(model_dir)
        if path is None:
            return
        directory = path.parent if target == "trtllm" else path
        status.engine_dir = str(directory)
        status.engine = str(read_json(directory / "engine.json").get("name", ""))
        status.manifest_sha256 = sha256_file(directory / "engine.json")
    except (OSError, IndexError, ToolchainError) as error:
        status.problem = f"its engine cannot be read: {error}"
