"""What rendering and serving need to know about an engine directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.files import read_json

TARGETS = ("local", "trtllm", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class EngineDir:
    path: Path
    """Absolute."""
    name: str
    target: str
    """``local``, ``trtllm`` or ``tensorrt``."""
    checkpoint: Path
    """Absolute directory of the quantized checkpoint, tokenizer included."""
    manifest: dict[str, Any]
    """engine.json as it stands."""


def read_engine_dir(path: Path) -> EngineDir:
    """Read ``path``/engine.json. UsageError when it is missing, incomplete, or its checkpoint is gone."""
    path = path.absolute()
    if not (path / "engine.json").is_file():
        what = "no such directory" if not path.is_dir() else "it holds no engine.json"
        raise UsageError(
            f"{path} is not an engine: {what}",
            hint="`toolchain engine MODEL` makes one; a directory without engine.json is unfinished",
            code="TC-611",
        )
    manifest = read_json(path / "engine.json")
    missing = [key for key in ("name", "target", "checkpoint") if key not in manifest]
    if missing:
        raise UsageError(
            f"{path / 'engine.json'} lacks {', '.join(missing)}", hint="build it again", code="TC-611"
        )
    if manifest["target"] not in TARGETS:
        raise UsageError(
            f"{path / 'engine.json'}: no Triton repository exists for target {manifest['target']!r}; "
            f"expected one of {', '.join(TARGETS)}",
            code="TC-611",
        )
    checkpoint = path / manifest["checkpoint"]
    if not (checkpoint / "config.json").is_file():
        raise UsageError(f"{checkpoint} has no config.json: the engine's checkpoint is gone", code="TC-611")
    return EngineDir(
        path=path, name=manifest["name"], target=manifest["target"], checkpoint=checkpoint, manifest=manifest
    )
