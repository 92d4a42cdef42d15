"""Whether an engine may be published, and what its readers will miss."""

from __future__ import annotations

from collections.abc import Iterator

from toolchain.checkpoint.manifest import check_manifest
from toolchain.core.errors import FindingsError
from toolchain.core.findings import Finding
from toolchain.core.progress import Progress
from toolchain.evaluate.gates import require_fit
from toolchain.publish.release import CHECKPOINT, Release

MANIFEST = "engine.json"


def check_release(release: Release, *, progress: Progress) -> list[Finding]:
    """Errors forbid publishing (gates, audit, changed bytes), warnings do not (TC-903). Reads every file once."""
    return [*_fit(release), *_audited(release), *_bytes(release, progress), *_missing_facts(release)]


def _fit(release: Release) -> Iterator[Finding]:
    try:
        require_fit(release.directory, release.manifest, allow_unfit=False)
    except FindingsError as error:
        yield from error.findings
        return
    marks = {MANIFEST: release.manifest, "metrics.json": release.metrics or {}}
    for where, document in marks.items():
        if document.get("fit") is False:
            hint = "try --recipe best, a format with more bits, or --format auto"
            yield _refusal(where, "the engine is marked as not fit to serve: it failed a gate", hint)
            return


def _audited(release: Release) -> Iterator[Finding]:
    if release.verdict is None:
        yield _refusal("verify.json", "the checkpoint was never audited", "`toolchain engine` audits it")
    elif not release.verdict.get("passed"):
        count = len(release.verdict.get("findings", ()))
        yield _refusal(
            "verify.json", f"the checkpoint failed its audit with {count} findings", "`toolchain verify`"
        )


def _bytes(release: Release, progress: Progress) -> Iterator[Finding]:
    if not release.checkpoint_files:
        yield _refusal(MANIFEST, "names no file of the checkpoint", "make the engine again")
    for finding in check_manifest(release.directory, progress=progress):
        if finding.severity == "error" or finding.where.startswith(CHECKPOINT):
            yield finding


def _missing_facts(release: Release) -> Iterator[Finding]:
    source = release.source
    if not source.hub_id:
        message = f"the source {source.name} has no name on the hub: the card names no base model"
        yield _warning("base model", message, "--base-model OWNER/NAME states it")
    if not source.license:
        message = "no card of the source tells its licence"
        yield _warning("licence", message, "--license apache-2.0 (or whatever it is) states it")
    if release.metrics is None:
        yield _warning(
            "metrics.json", "quality was not measured, the card says so", "--eval-data, or --tasks"
        )
    if release.manifest["model"]["source"].startswith("/"):
        message = "plan.json and quantize.json of the checkpoint say where the source lay on this machine"
        yield _warning("checkpoint", message, "quantize by the hub's name to avoid that")


def _refusal(where: str, message: str, hint: str) -> Finding:
    return Finding(code="TC-902", where=where, message=message, hint=hint)


def _warning(where: str, message: str, hint: str) -> Finding:
    return Finding(code="TC-903", where=where, message=message, hint=hint, severity="warning")
