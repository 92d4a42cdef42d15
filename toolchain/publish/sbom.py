"""The bill of materials of an engine: CycloneDX 1.6, JSON.

The quantized model descends from the source model (``pedigree``), and depends on the data that it was calibrated on and
on the packages that made it. The same engine gives the same bytes: the serial number comes from engine.json's hash, the
time is the engine's.
"""

from __future__ import annotations

import datetime
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.core.files import atomic_write_text
from toolchain.evaluate.gates import checkpoint_identity
from toolchain.publish.names import bare, bare_command
from toolchain.publish.packages import Package, packages_of
from toolchain.publish.release import Release, read_release

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component

FILE = "sbom.cdx.json"
NAMESPACE = uuid.UUID("6f0f1ad5-64d4-5f0e-9c3f-3f7b3a6e9d10")
"""Of serial numbers: a UUID of our own, so that they differ from those of other tools over the same hash."""
PREFIX = "toolchain:"
"""Of the names of properties."""


def write_sbom(engine: Path) -> Path:
    """Write ``engine``/sbom.cdx.json, atomically; returns its path. UsageError TC-901 for an unfinished engine."""
    path = engine / FILE
    atomic_write_text(path, render_sbom(read_release(engine)))
    return path


def render_sbom(release: Release) -> str:
    """The document as text."""
    from cyclonedx.output.json import JsonV1Dot6

    return JsonV1Dot6(_bom(release)).output_as_string(indent=2) + "\n"


def _bom(release: Release) -> Bom:
    from cyclonedx.model.bom import Bom, BomMetaData

    source, model = _source(release), _model(release)
    data = _data(release)
    packages = packages_of(release.manifest.get("versions", {}))
    libraries = {item.name: _library(item) for item in packages}
    model.pedigree = _pedigree(release, source)
    bom = Bom(
        serial_number=uuid.uuid5(NAMESPACE, release.manifest_sha256),
        metadata=BomMetaData(
            component=model,
            timestamp=datetime.datetime.fromisoformat(release.manifest["created"]),
            properties=_properties(
                command=bare_command(release.manifest.get("command", ())),
                git_commit=release.manifest.get("git_commit"),
                python=release.manifest.get("versions", {}).get("python"),
                manifest_sha256=release.manifest_sha256,
            ),
        ),
        components=[*data, source, *libraries.values()],
    )
    made_by = [libraries["toolchain"]] if "toolchain" in libraries else list(libraries.values())
    bom.register_dependency(model, [source, *data, *made_by])
    for package in packages:
        bom.register_dependency(
            libraries[package.name], [libraries[name] for name in package.requires if name in libraries]
        )
    return bom


def _model(release: Release) -> Component:
    """The quantized model: the subject of the document, with every file of the checkpoint inside."""
    from cyclonedx.model.component import Component, ComponentType

    manifest = release.manifest
    identity = checkpoint_identity(manifest["files"])
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=release.name,
        version=identity[:12],
        bom_ref="model",
        description=f"{release.source.name} quantized to {manifest.get('quant_algo', 'an unnamed format')}",
        licenses=_licenses(release),
        components=_files("model", release.checkpoint_files),
        properties=_properties(
            checkpoint_identity=identity,
            architecture=manifest["model"].get("architecture"),
            quant_algo=manifest.get("quant_algo"),
            formats=",".join(manifest.get("formats", ())) or None,
            kv_cache=manifest.get("kv_cache"),
            policy=manifest.get("policy"),
            recipe=release.plan.get("recipe"),
            target=manifest.get("target"),
        ),
    )


def _source(release: Release) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    source = release.source
    owner, _, name = source.name.rpartition("/")
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=name,
        group=owner or None,
        bom_ref="source-model",
        licenses=_licenses(release),
        external_references=_website(source.hub_id),
        components=_files("source-model", release.manifest.get("inputs", {}).get("model") or {}),
        properties=_properties(
            architecture=release.manifest["model"].get("architecture"),
            model_identity=release.manifest["model"].get("identity"),
        ),
    )


def _pedigree(release: Release, source: Component) -> Any:
    """The source as ancestor, by name alone: the whole of it stands among the components."""
    from cyclonedx.model.component import Component, Pedigree

    ancestor = Component(type=source.type, name=source.name, group=source.group, bom_ref="ancestor")
    recipe = release.plan.get("recipe", "max")
    return Pedigree(ancestors=[ancestor], notes=f"quantized by toolchain, recipe {recipe}")


def _data(release: Release) -> list[Component]:
    """What the model was calibrated and judged on."""
    calibration = release.quantization.get("calibration")
    inputs = release.manifest.get("inputs", {})
    found = []
    if calibration:
        facts = {key: calibration.get(key) for key in ("samples", "length_tokens", "seed", "tokens_sha256")}
        content = inputs.get("calibration")
        found.append(_text_data("calibration-data", calibration.get("source"), content, facts))
    judged = (release.metrics or {}).get("data")
    if judged:
        facts = {"tokens": judged.get("tokens"), "tokens_sha256": judged.get("token_hash")}
        found.append(_text_data("evaluation-data", judged.get("source"), inputs.get("evaluation"), facts))
    return found


def _text_data(reference: str, source: Any, content: str | None, facts: dict[str, Any]) -> Component:
    """``content``: SHA-256 of the text file; one hash over those of several, or of a directory, is a property only."""
    from cyclonedx.model.component import Component, ComponentType

    name = bare(source)
    is_file = bool(Path(name).suffix) and ", " not in name
    return Component(
        type=ComponentType.DATA,
        name=name or reference,
        bom_ref=reference,
        hashes=_sha256(content) if content and is_file else None,
        properties=_properties(content_sha256=content, **facts),
    )


def _library(package: Package) -> Component:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    return Component(
        type=ComponentType.LIBRARY,
        name=package.name,
        version=package.version,
        bom_ref=f"python/{package.name}",
        purl=PackageURL(type="pypi", name=package.name, version=package.version),
        licenses=[LicenseFactory().make_from_string(package.license)] if package.license else None,
    )


def _licenses(release: Release) -> list[Any] | None:
    """The source's: quantizing changes numbers, not terms."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import XsUri

    text, link = release.source.license_text, release.source.license_link
    if not text:
        return None
    return [LicenseFactory().make_from_string(text, license_url=XsUri(link) if link else None)]


def _files(owner: str, hashes: dict[str, str]) -> list[Component]:
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(type=ComponentType.FILE, name=name, bom_ref=f"{owner}/{name}", hashes=_sha256(digest))
        for name, digest in sorted(hashes.items())
    ]


def _sha256(digest: str) -> list[Any]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=digest)]


def _website(hub_id: str | None) -> list[Any] | None:
    from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri

    if not hub_id:
        return None
    return [
        ExternalReference(type=ExternalReferenceType.WEBSITE, url=XsUri(f"https://huggingface.co/{hub_id}"))
    ]


def _properties(**values: Any) -> list[Any]:
    from cyclonedx.model import Property

    return [
        Property(name=f"{PREFIX}{name}", value=str(value))
        for name, value in values.items()
        if value is not None
    ]
