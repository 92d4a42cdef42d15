"""An engine as it is published: every document that says something about it, read once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.files import read_json, sha256_file
from toolchain.publish.source import SourceFacts, read_source

CHECKPOINT = "checkpoint/"
"""Prefix of the checkpoint's files in ``engine.json["files"]``."""


@dataclass(frozen=True, kw_only=True)
class Release:
    directory: Path
    manifest: dict[str, Any]
    """engine.json."""
    manifest_sha256: str
    plan: dict[str, Any]
    quantization: dict[str, Any]
    """checkpoint/quantize.json; empty where there is none."""
    verdict: dict[str, Any] | None
    """verify.json; None: never audited."""
    metrics: dict[str, Any] | None
    """metrics.json where something was measured."""
    bench: tuple[dict[str, Any], ...]
    """bench/*.json, oldest first."""
    source: SourceFacts

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def checkpoint_files(self) -> dict[str, str]:
        """Path below checkpoint/ -> SHA-256, as engine.json has them."""
        files = self.manifest.get("files", {})
        return {
            path.removeprefix(CHECKPOINT): digest
            for path, digest in sorted(files.items())
            if path.startswith(CHECKPOINT)
        }

    @property
    def shards(self) -> list[Path]:
        """Files with weights that are there, whatever engine.json says."""
        return sorted((self.directory / "checkpoint").glob("*.safetensors"))

    @property
    def is_moe(self) -> bool:
        return any(item["role"] == "routed_expert" for item in self.plan.get("assignments", ()))


def read_release(directory: Path, *, base_model: str | None = None, license_id: str | None = None) -> Release:
    """Read an engine directory. UsageError TC-901 for what is no finished engine."""
    manifest_path = directory / "engine.json"
    if not manifest_path.is_file():
        what = "no such directory" if not directory.is_dir() else "it holds no engine.json"
        raise UsageError(
            f"{directory} is no finished engine: {what}",
            hint="`toolchain engine MODEL` makes one",
            code="TC-901",
        )
    manifest = read_json(manifest_path)
    missing = [key for key in ("name", "model", "files") if key not in manifest]
    if missing:
        raise UsageError(
            f"{manifest_path} lacks {', '.join(missing)}", hint="make the engine again", code="TC-901"
        )
    metrics = _optional(directory / "metrics.json")
    return Release(
        directory=directory,
        manifest=manifest,
        manifest_sha256=sha256_file(manifest_path),
        plan=_optional(directory / "plan.json") or {},
        quantization=_optional(directory / "checkpoint" / "quantize.json") or {},
        verdict=_optional(directory / "verify.json"),
        metrics=metrics if metrics and (metrics.get("measured", True) or metrics.get("tasks")) else None,
        bench=tuple(read_json(path) for path in sorted((directory / "bench").glob("*.json"))),
        source=read_source(manifest["model"]["source"], base_model=base_model, license_id=license_id),
    )


def _optional(path: Path) -> dict[str, Any] | None:
    value = read_json(path) if path.is_file() else None
    return value if isinstance(value, dict) else None
