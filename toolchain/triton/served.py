"""``<model>/<version>/served.json``: what belongs to one version of a ``local`` model, and to that version alone.

Not in config.pbtxt, which all versions share: a rolling update puts another engine into version N+1 while version N
still serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.files import atomic_write_json, read_json
from toolchain.runtime.ways import Wish

SERVED = "served.json"
CANCELLATION_CHECK_PERIOD_MS = 100
"""How often running requests are asked whether their client has gone; the default of the llmapi model."""


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """What the engine process refuses instead of letting it wait. None: its own default."""

    max_waiting: int | None = None
    """Requests in the queue."""
    max_waiting_tokens: int | None = None
    """Prompt tokens of the requests in the queue."""
    max_queue_s: float | None = None
    """Longest wait in the queue, in seconds."""


def write_served(
    version_dir: Path,
    *,
    engine_dir: Path,
    python: str,
    ready_timeout_s: int,
    limits: QueueLimits,
    wish: Wish,
    warmup_requests: int = 0,
) -> None:
    """Write served.json into ``version_dir``. ``engine_dir`` and ``python``: absolute, as the server sees them."""
    document: dict[str, Any] = {
        "engine_dir": str(engine_dir),
        "python": python,
        "ready_timeout_s": ready_timeout_s,
        "cancellation_check_period_ms": CANCELLATION_CHECK_PERIOD_MS,
    }
    if warmup_requests:
        document["warmup_requests"] = warmup_requests
    document |= {key: value for key, value in vars(limits).items() if value is not None}
    document |= {key: value for key, value in vars(wish).items() if value != getattr(Wish, key)}
    atomic_write_json(version_dir / SERVED, document)


def read_served(version_dir: Path) -> dict[str, Any]:
    """The object in ``version_dir``/served.json. UsageError when it is missing or no JSON object."""
    document = read_json(version_dir / SERVED)
    if not isinstance(document, dict):
        raise UsageError(
            f"{version_dir / SERVED} holds a {type(document).__name__}, expected an object",
            hint="render the repository again",
            code="TC-604",
        )
    return document


def version_dirs(model: Path) -> list[Path]:
    """Version directories of a model, oldest first: those with a number above 0 as name, as Triton reads them."""
    found = [path for path in model.iterdir() if path.is_dir() and path.name.isdigit() and int(path.name) > 0]
    return sorted(found, key=lambda path: int(path.name))
