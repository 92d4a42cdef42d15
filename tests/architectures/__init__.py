"""Published configurations of well-known models, and what they are when read without weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from toolchain.models import ModelInfo, read_model

HERE = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.json")))


@cache
def recorded(name: str) -> dict[str, Any]:
    """``hubs``, ``published`` and ``config`` of one architecture."""
    value: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text())
    return value


def name_of(hub: str) -> str:
    """The architecture of a hub id."""
    return next(name for name in NAMES if hub in recorded(name)["hubs"])


def write_config(name: str, directory: Path) -> Path:
    """A model directory that holds the published config.json and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(recorded(name)["config"]))
    return directory


@cache
def _read(name: str, directory: Path) -> ModelInfo:
    return read_model(str(write_config(name, directory)))


class Architectures:
    """``get(name)``: the model as it is read from its config alone, once per session."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, name: str) -> ModelInfo:
        return _read(name, self.root / name)
