"""The stages that tell people what the engine is: its bill of materials and its report. Not part of what they describe.

engine.json does not list them: the report is written again whenever there is more to tell (a benchmark, tasks, gates).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.core.environment import package_versions
from toolchain.core.files import hash_tree, sha256_file
from toolchain.pipeline.workspace import Workspace

SBOM = "sbom.cdx.json"
REPORT = "report"
TOLD = ("engine.json", "gates.json", "tasks.json", "sensitivity.json")
"""Files beside the report that it reads and that may change without engine.json."""


def write_documents(workspace: Workspace) -> None:
    """Write or refresh both, of a finished engine."""
    engine = workspace.directory
    settings = {
        "engine": sha256_file(engine / "engine.json"),
        "directory": str(engine.resolve()),
        **_version(),
    }
    workspace.stage("sbom", settings, (SBOM,), lambda: _sbom(engine))
    read = {name: sha256_file(engine / name) if (engine / name).is_file() else None for name in TOLD}
    settings = {
        **read,
        "bench": hash_tree(engine / "bench"),
        "directory": str(engine.resolve()),
        **_version(),
    }
    workspace.stage("report", settings, (REPORT,), lambda: _report(engine, workspace))


def _version() -> dict[str, Any]:
    return {"version of toolchain": package_versions().get("toolchain")}


def _sbom(engine: Path) -> dict[str, Any]:
    from toolchain.publish.sbom import write_sbom

    return {"file": write_sbom(engine).name}


def _report(engine: Path, workspace: Workspace) -> dict[str, Any]:
    from toolchain.report import write_report

    return {"file": str(write_report(engine, progress=workspace.progress).relative_to(engine))}
