"""What a path given to the runtime is, an engine or a checkpoint, and the limits that hold there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json

DEFAULT_MAX_BATCH_SIZE = 8
"""Rows of the running batch when neither the engine nor the caller names a number."""
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Names that Hugging Face configs use for the longest sequence, in the order in which they are tried."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_batch_size: int
    """Requests that are generated at the same time."""
    max_seq_len: int
    """Prompt and answer together, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Location:
    name: str
    checkpoint: Path
    """Directory with config.json, safetensors and tokenizer."""
    planned: dict[str, int]
    """``limits`` of engine.json; empty for a bare checkpoint."""
    engine: Path | None = None
    """Directory with engine.json; None for a bare checkpoint."""


def locate(path: Path | str) -> Location:
    """Resolve an engine or checkpoint directory. UsageError when missing, ToolchainError when unfinished."""
    path = Path(path)
    if not path.is_dir():
        raise UsageError(
            f"{path} is not a directory; expected an engine or a checkpoint directory",
            hint="`ls engines/` shows the engines made here",
            code="TC-502",
        )
    if (path / "engine.json").is_file():
        return _engine(path)
    if (path / "config.json").is_file():
        return Location(name=path.resolve().name, checkpoint=path, planned={})
    if (path / "checkpoint").is_dir():
        raise ToolchainError(
            f"{path} has a checkpoint but no engine.json: the engine was not finished",
            hint="run `toolchain engine` again, it continues where it stopped; or give its checkpoint",
            code="TC-502",
        )
    raise UsageError(
        f"{path} has neither engine.json nor config.json",
        hint="give an engine directory or a Hugging Face checkpoint directory",
        code="TC-502",
    )


def _engine(path: Path) -> Location:
    manifest = read_json(path / "engine.json")
    checkpoint = path / "checkpoint"
    if not isinstance(manifest, dict) or not (checkpoint / "config.json").is_file():
        raise ToolchainError(
            f"{path} is damaged: expected engine.json to be an object and checkpoint/config.json to exist",
            hint="build the engine again with --force",
            code="TC-502",
        )
    limits = manifest.get("limits") or {}
    planned = {
        key: limits[key] for key in ("max_batch_size", "max_seq_len") if isinstance(limits.get(key), int)
    }
    return Location(
        name=str(manifest.get("name") or path.resolve().name),
        checkpoint=checkpoint,
        planned=planned,
        engine=path,
    )


def resolve_limits(
    location: Location, config: Any, *, max_batch_size: int | None, max_seq_len: int | None
) -> Limits:
    """Limits of a run: the caller may lower what the engine was planned for, never raise it.

    ``config`` is the model's config.json as a mapping (text config of a multimodal wrapper). Raises
    UsageError.
    """
    positions = next((config[key] for key in POSITION_KEYS if isinstance(config.get(key), int)), None)
    return Limits(
        max_batch_size=_limit(
            "max_batch_size", max_batch_size, location.planned.get("max_batch_size"), DEFAULT_MAX_BATCH_SIZE
        ),
        max_seq_len=_limit("max_seq_len", max_seq_len, location.planned.get("max_seq_len", positions), 2048),
    )


def _limit(name: str, wanted: int | None, planned: int | None, default: int) -> int:
    if wanted is None:
        return planned if planned is not None else default
    if wanted < 1:
        raise UsageError(f"{name} {wanted} (expected >= 1)", code="TC-509")
    if planned is not None and wanted > planned:
        raise UsageError(
            f"{name} {wanted} exceeds {planned}, what the engine or the model was made for",
            hint=f"use {name} <= {planned}, or build another engine",
            code="TC-509",
        )
    return wanted
