"""What is uploaded: every file, its size, and the card; and what speaks against it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.findings import Finding, errors
from toolchain.core.progress import Progress, Silent
from toolchain.publish.card import render_card
from toolchain.publish.checks import check_release
from toolchain.publish.release import read_release
from toolchain.publish.sbom import FILE as SBOM
from toolchain.publish.sbom import render_sbom

CARD = "README.md"
BESIDE = ("llm_args.yaml", "versions.lock.json")
"""What TensorRT-LLM's target writes beside the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Item:
    path: str
    """In the repository; the checkpoint's files stand at its root, where runtimes look for them."""
    content: Path | bytes

    @property
    def size_bytes(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


@dataclass(frozen=True, kw_only=True)
class Publication:
    repo_id: str
    items: tuple[Item, ...]
    card: str
    findings: tuple[Finding, ...]

    @property
    def size_bytes(self) -> int:
        return sum(item.size_bytes for item in self.items)

    def require_allowed(self, *, force: bool) -> None:
        """FindingsError TC-902 when something forbids publishing, unless ``force``."""
        refused = errors(self.findings)
        if refused and not force:
            raise FindingsError(
                f"{self.repo_id} is not published: {len(refused)} reasons against it",
                refused,
                hint="mend the engine; --force publishes it all the same, and the card says why it should not be used",
                code="TC-902",
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "repo_id": self.repo_id,
            "files": [{"path": item.path, "bytes": item.size_bytes} for item in self.items],
            "bytes": self.size_bytes,
            "findings": [finding.to_json() for finding in self.findings],
            "card": self.card,
        }


def prepare(
    directory: Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license_id: str | None = None,
    progress: Progress | None = None,
) -> Publication:
    """Everything that publishing ``directory`` as ``repo_id`` would upload. Reads files, asks no network.

    UsageError TC-901 for no engine, TC-906 for names that the hub does not take.
    """
    for name in (repo_id, *([base_model] if base_model else [])):
        _check_name(name)
    release = read_release(directory, base_model=base_model, license_id=license_id)
    findings = tuple(check_release(release, progress=progress or Silent()))
    card = render_card(release, repo_id, forced=tuple(map(str, errors(findings))))
    files = {name: release.directory / "checkpoint" / name for name in release.checkpoint_files}
    items = [Item(path=name, content=path) for name, path in files.items() if path.is_file() and name != CARD]
    items += [
        Item(path=name, content=release.directory / name)
        for name in BESIDE
        if (release.directory / name).is_file()
    ]
    items += [
        Item(path=CARD, content=card.encode()),
        Item(path=SBOM, content=render_sbom(release).encode()),
    ]
    return Publication(
        repo_id=repo_id,
        items=tuple(sorted(items, key=lambda item: item.path)),
        card=card,
        findings=findings,
    )


def _check_name(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(
            f"{name!r} is no name of a repository on the hub",
            hint="owner/name: letters, digits, - _ and ., at most 96 characters",
            code="TC-906",
        )
