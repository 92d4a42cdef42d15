"""The directory of an engine in the making: its stages, and engine.json, which is there only when all of it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.files import atomic_write_json
from toolchain.core.progress import Progress
from toolchain.pipeline.stages import Stage, run_stage


@dataclass(frozen=True, kw_only=True)
class Workspace:
    directory: Path
    force: bool
    progress: Progress

    def stage(
        self, name: str, settings: dict[str, Any], outputs: tuple[str | Path, ...], run: Any
    ) -> dict[str, Any]:
        """Run or skip a stage whose ``outputs`` are names in the directory, or paths; returns its record."""
        paths = tuple(self.directory / output for output in outputs)
        stage = Stage(name=name, settings=settings, outputs=paths, run=run)
        return run_stage(self.directory, stage, force=self.force, progress=self.progress)

    def unfinish(self) -> None:
        """Called before anything changes that engine.json describes: without it the directory is unfinished."""
        (self.directory / "engine.json").unlink(missing_ok=True)

    def write(self, name: str, value: dict[str, Any]) -> None:
        self.unfinish()
        atomic_write_json(self.directory / name, value)
