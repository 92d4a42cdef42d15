"""What supervision knows about each model of a server; written by its thread, read by the status endpoint."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class ModelHealth:
    name: str
    up: bool = True
    """By the last probe; a server starts to be supervised once every model has answered an inference."""
    reason: str = ""
    """Why it is not."""
    recoveries: int = 0
    last_probe: float = 0.0
    """time.time() of the last probe that was answered, or of the last generated token seen."""
    stub_seconds: float = 0.0
    """How long the stub took to answer."""
    engine_seconds: float = 0.0
    """How long one token took, when the engine had nothing else to do."""
    running: int = 0
    waiting: int = 0
    generated_tokens: int = 0
    """Since the server started; target local only."""
    tokens_per_second: float = 0.0
    """Over the last probe interval."""


class Health:
    """The health of all models of a server. Methods may be called from any thread."""

    def __init__(self, models: tuple[str, ...]) -> None:
        self._lock = threading.Lock()
        self._models = {name: ModelHealth(name=name, last_probe=time.time()) for name in models}
        self.serving = False
        """Set once every model has answered an inference."""
        self.draining = False
        self.started = time.time()

    @property
    def ready(self) -> bool:
        """Whether every model answers and new requests are taken."""
        with self._lock:
            return self._takes_requests and all(model.up for model in self._models.values())

    @property
    def _takes_requests(self) -> bool:
        return self.serving and not self.draining

    def update(self, name: str, **values: Any) -> None:
        """Set fields of the model ``name``."""
        with self._lock:
            for key, value in values.items():
                setattr(self._models[name], key, value)

    def recovered(self, name: str) -> None:
        """Count one recovery that was tried."""
        with self._lock:
            self._models[name].recoveries += 1

    def get(self, name: str) -> ModelHealth:
        """A copy of what is known about ``name``."""
        with self._lock:
            return ModelHealth(**asdict(self._models[name]))

    def snapshot(self) -> dict[str, Any]:
        """All of it as JSON."""
        with self._lock:
            models = [asdict(model) for model in self._models.values()]
        return {
            "ready": self._takes_requests and all(model["up"] for model in models),
            "draining": self.draining,
            "uptime_s": round(time.time() - self.started, 1),
            "models": models,
        }
