"""engine.json against the bytes of its engine: whatever changed, is missing or came later is named.

engine.json holds the SHA-256 of every file that its stages wrote. It cannot hold its own: ``digest`` in it is that of
its content in canonical form, so that a changed byte of it is found, too (of white space not: that says nothing).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json, sha256_file, sha256_json
from toolchain.core.findings import Finding
from toolchain.core.progress import Progress, Silent

MANIFEST = "engine.json"
DIGEST = "digest"
STAGES = "stages"
"""Records of the stages: engine.json has a copy of each, so that they are compared and not hashed."""
LATER = ("bench", "gates.json", "report", "sbom.cdx.json", "sensitivity.json", STAGES, "tasks.json")
"""What commands write into an engine after it is made."""


def check_manifest(engine: Path, *, progress: Progress | None = None) -> list[Finding]:
    """Every difference between ``engine`` and its engine.json; empty when not a byte differs.

    UsageError TC-502 without an engine.json, ToolchainError TC-003 for one that is no manifest.
    """
    path = engine / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{engine} has no {MANIFEST}",
            hint="--manifest checks an engine directory that `toolchain engine` or `toolchain build` made",
            code="TC-502",
        )
    manifest = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise ToolchainError(f"{path} has no `files`: it is no manifest", code="TC-003")
    return [
        *_own_digest(manifest),
        *_recorded(engine, files, progress or Silent()),
        *_stages(engine, manifest),
        *_unknown(engine, files),
    ]


def _own_digest(manifest: dict[str, Any]) -> Iterator[Finding]:
    said = manifest.get(DIGEST)
    if said is None:
        message = "has no digest of itself (made by an earlier version): its other fields are not covered"
        yield Finding(code="TC-344", where=MANIFEST, message=message, severity="warning")
    elif said != digest_of(manifest):
        yield _changed(MANIFEST, said, digest_of(manifest))


def digest_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its digest, in canonical form."""
    return sha256_json({key: value for key, value in manifest.items() if key != DIGEST})


def _recorded(engine: Path, files: dict[str, str], progress: Progress) -> Iterator[Finding]:
    """Hashes in threads: hashlib gives up the interpreter lock."""
    there = [name for name in files if (engine / name).is_file()]
    for name in sorted(set(files) - set(there)):
        yield Finding(code="TC-343", where=name, message=f"is missing; {MANIFEST} has its hash")
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.map(lambda name: sha256_file(engine / name), there)
        pairs = zip(there, hashes, strict=True)
        for name, digest in progress.track(pairs, description="hash files", total=len(there)):
            if digest != files[name]:
                yield _changed(name, files[name], digest)


def _changed(name: str, said: str, found: str) -> Finding:
    return Finding(
        code="TC-343", where=name, message=f"has SHA-256 {found[:16]}.., {MANIFEST} says {said[:16]}.."
    )


def _stages(engine: Path, manifest: dict[str, Any]) -> Iterator[Finding]:
    """Each record of a stage says what its copy in engine.json says."""
    for name, copy in (manifest.get(STAGES) or {}).items():
        path = engine / STAGES / f"{name}.json"
        if not path.is_file():
            continue
        where = f"{STAGES}/{name}.json"
        try:
            record = read_json(path)
        except ToolchainError as error:
            yield Finding(code="TC-343", where=where, message=error.message)
            continue
        if (
            isinstance(record, dict)
            and isinstance(copy, dict)
            and {key: record.get(key) for key in copy} != copy
        ):
            yield Finding(code="TC-343", where=where, message=f"differs from the copy in {MANIFEST}")


def _unknown(engine: Path, files: dict[str, str]) -> Iterator[Finding]:
    """Files that nobody recorded: an error where runtimes load whatever they find, a warning elsewhere."""
    covered = {Path(name).parts[0] for name in files if len(Path(name).parts) > 1}
    for path in sorted(engine.rglob("*")):
        relative = path.relative_to(engine)
        name = str(relative)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not path.is_file() or hidden or name in files or name == MANIFEST or relative.parts[0] in LATER:
            continue
        if relative.parts[0] in covered:
            yield Finding(code="TC-344", where=name, message=f"{MANIFEST} knows no such file")
        else:
            message = f"{MANIFEST} knows no such file: it is not covered"
            yield Finding(code="TC-344", where=name, message=message, severity="warning")
