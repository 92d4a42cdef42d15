"""What each model is and how it can be called: a decoupled one not by HTTP's infer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from toolchain.triton.rules.backends import ENSEMBLE, backend_of
from toolchain.triton.rules.model import Model
from toolchain.triton.rules.versions import loaded_versions

PLAIN = ("HTTP infer", "gRPC infer", "gRPC stream", "/generate", "/generate_stream")
DECOUPLED = ("gRPC stream", "/generate_stream", "/generate (one response only)")
"""HTTP infer answers 501 and gRPC infer UNIMPLEMENTED; /generate fails when there are several responses."""


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    model: str
    backend: str
    versions: tuple[str, ...]
    """Those that its version policy loads, newest first."""
    decoupled: bool
    endpoints: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        how = ", ".join(self.endpoints) if self.decoupled else "any endpoint"
        kind = "decoupled: " if self.decoupled else ""
        versions = ", ".join(self.versions) or "none"
        return f"{self.model} ({self.backend or 'no backend'}, version {versions}): {kind}{how}"


def endpoints(models: Mapping[str, Model]) -> list[Endpoints]:
    return [
        Endpoints(
            model=name,
            backend=backend_of(model),
            versions=tuple(path.name for path in loaded_versions(model)),
            decoupled=(decoupled := is_decoupled(name, models, ())),
            endpoints=DECOUPLED if decoupled else PLAIN,
        )
        for name, model in sorted(models.items())
    ]


def is_decoupled(name: str, models: Mapping[str, Model], above: tuple[str, ...]) -> bool:
    """An ensemble is where one of its steps is, whatever it says itself; the llmapi layout by its model.yaml."""
    model = models.get(name)
    if model is None or name in above:
        return False
    if backend_of(model) == ENSEMBLE:
        steps = model.config.ensemble_scheduling.step
        return any(is_decoupled(step.model_name, models, (*above, name)) for step in steps)
    declared = bool(model.config.model_transaction_policy.decoupled)
    return declared or any((path / "model.yaml").is_file() for path in loaded_versions(model))
