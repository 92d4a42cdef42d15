"""The files of an engine directory that a report reads. JSON and file sizes only; no tensor is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json, sha256_file
from toolchain.evaluate.gates import checkpoint_identity
from toolchain.report.documents import Document, text

FILES = {
    "manifest": "engine.json",
    "plan": "plan.json",
    "metrics": "metrics.json",
    "audit": "verify.json",
    "quantize": "checkpoint/quantize.json",
    "coverage": "checkpoint/coverage.json",
    "sensitivity": "sensitivity.json",
    "auto": "auto.json",
    "gates": "gates.json",
    "tasks": "tasks.json",
}
"""Name in ``EngineFiles`` -> path in the engine directory."""
SOURCE_BENCHES = "bench/source"
"""Where benchmarks of the source model are, in the engine directory."""


@dataclass(frozen=True, kw_only=True)
class EngineFiles:
    """Documents that are absent are empty."""

    directory: Path
    manifest: Document
    plan: Document
    metrics: Document
    audit: Document
    quantize: Document
    coverage: Document
    sensitivity: Document
    auto: Document
    gates: Document
    """Gates as judged last; empty when that was on other bytes than those of the engine now."""
    tasks: Document
    """Scores of lm-evaluation-harness; empty when they are of other bytes."""
    outdated: tuple[str, ...]
    """Names of the two files that were left out for that reason."""
    benches: tuple[tuple[str, Document], ...]
    """File name and result of each benchmark, the oldest first."""
    source_benches: tuple[tuple[str, Document], ...]
    """The same of the source model, run by the same runtime."""
    stages: Document
    """Stage -> its record, from engine.json or, where that is not written yet, from stages/."""
    shard_bytes: int | None
    """Of the safetensors files as they lie on disk, headers included."""
    manifest_sha256: str | None

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def where(self) -> str:
        """What to type for this engine."""
        parent = self.directory.resolve().parent.name
        return f"engines/{self.name}" if parent == "engines" else self.name

    @property
    def to_measure(self) -> str:
        """How figures of quality come into the report."""
        model = text(self.plan, "model") or "MODEL"
        where = f"--output {self.where}/{FILES['metrics']} --force"
        return f"run `toolchain evaluate {self.where} --baseline {model} {where}`"


def read_engine(directory: Path) -> EngineFiles:
    """UsageError TC-801 when ``directory`` holds none of the files; TC-003 or TC-802 for damaged ones."""
    if not directory.is_dir():
        raise UsageError(
            f"{directory} is no directory, expected an engine",
            hint="`toolchain engine MODEL --format F` makes one under engines/",
            code="TC-801",
        )
    found = {name: _document(directory / path) for name, path in FILES.items()}
    if not any(found.values()):
        raise UsageError(
            f"{directory} holds nothing to report on: none of {', '.join(FILES.values())}",
            hint="give an engine directory, one that `toolchain engine` or `toolchain build` wrote",
            code="TC-801",
        )
    outdated = _leave_out_outdated(found)
    manifest = directory / "engine.json"
    records = found["manifest"].get("stages")
    shards = [path.stat().st_size for path in sorted((directory / "checkpoint").glob("*.safetensors"))]
    return EngineFiles(
        directory=directory,
        **found,
        outdated=outdated,
        benches=_benches(directory / "bench"),
        source_benches=_benches(directory / SOURCE_BENCHES),
        stages=records if isinstance(records, Mapping) else _records(directory / "stages"),
        shard_bytes=sum(shards) if shards else None,
        manifest_sha256=sha256_file(manifest) if manifest.is_file() else None,
    )


def _leave_out_outdated(found: dict[str, Document]) -> tuple[str, ...]:
    """Gates and tasks hold for the bytes that were judged, which both name by the hash of the checkpoint's files."""
    hashes = found["manifest"].get("files")
    if not isinstance(hashes, dict):
        return ()
    now = checkpoint_identity(hashes)
    left = []
    for name, key in (("gates", "checkpoint"), ("tasks", "identity")):
        if found[name] and found[name].get(key) != now:
            found[name] = {}
            left.append(FILES[name])
    return tuple(left)


def _benches(directory: Path) -> tuple[tuple[str, Document], ...]:
    return tuple((path.name, _document(path)) for path in sorted(directory.glob("*.json")))


def _records(directory: Path) -> Document:
    return {path.stem: _document(path) for path in sorted(directory.glob("*.json"))}


def _document(path: Path) -> Document:
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, Mapping):
        raise ToolchainError(
            f"{path} holds a JSON {type(value).__name__}, expected an object",
            hint="the file was not written by the toolchain, or was changed: remove it or run its stage again",
            code="TC-802",
        )
    return value
