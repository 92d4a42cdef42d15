"""The Python packages that made an engine, with their licences as far as their metadata tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

LONGEST_NAME = 60
"""Some packages put the whole text of their licence where its name belongs."""


@dataclass(frozen=True, kw_only=True)
class Package:
    name: str
    """Canonical: lower case, with hyphens."""
    version: str
    license: str | None = None
    """SPDX expression or the name that the package gives; None where it says nothing."""
    requires: tuple[str, ...] = ()
    """Names of packages of the same list."""


def packages_of(recorded: Mapping[str, str]) -> list[Package]:
    """Packages in order of their names. ``recorded``: versions in engine.json.

    Where the recorded ones are those installed here, everything that they require is listed as well. In another
    environment only what was recorded is certain, so only that is listed.
    """
    versions = {canonicalize_name(name): version for name, version in recorded.items() if name != "python"}
    installed = {name: _find(name) for name in versions}
    if all(found and found.version == versions[name] for name, found in installed.items()):
        return [_package(found) for _, found in sorted(_closure(list(versions)).items())]
    return [
        Package(name=name, version=version, license=_license_if(installed[name], version))
        for name, version in sorted(versions.items())
    ]


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _closure(roots: list[str]) -> dict[str, Distribution]:
    """``roots`` and all that they require without extras, of what is installed."""
    found: dict[str, Distribution] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        package = _find(name) if name not in found else None
        if package is not None:
            found[name] = package
            waiting.extend(_required(package))
    return found


def _required(package: Distribution) -> Iterator[str]:
    for line in package.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def _package(package: Distribution) -> Package:
    return Package(
        name=canonicalize_name(package.metadata["Name"]),
        version=package.version,
        license=_license(package),
        requires=tuple(sorted({name for name in _required(package) if _find(name)})),
    )


def _license_if(package: Distribution | None, version: str) -> str | None:
    return _license(package) if package and package.version == version else None


def _license(package: Distribution) -> str | None:
    """License-Expression (PEP 639), else the License field where it is an SPDX identifier, else the classifiers, else
    that field as it stands."""
    from cyclonedx.spdx import fixup_id

    if "License-Expression" in package.metadata:
        return package.metadata["License-Expression"]
    field = package.metadata["License"].strip() if "License" in package.metadata else ""
    if field and fixup_id(field):
        return field
    classifiers = package.metadata.get_all("Classifier") or []
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License :: ")]
    named = sorted(name for name in named if name != "OSI Approved")
    if named:
        return " OR ".join(named)
    return field if field and len(field) <= LONGEST_NAME and "\n" not in field else None
