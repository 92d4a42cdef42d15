"""Version directories, and which of them the version policy loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from toolchain.core.findings import Finding
from toolchain.triton.rules.model import Model
from toolchain.triton.rules.rule import Rule

BESIDE = ("warmup", "initial_state", "configs")
"""Directories of a model that are no versions (``constants.h``)."""
LARGEST = 2**63 - 1
NONE = Rule(
    code="TC-604",
    says="no version directory",
    server="refuses",
    hint="expected a directory 1/ that holds the model, empty where the backend needs no file",
)
POLICY = Rule(
    code="TC-652",
    says="a version policy that loads no version",
    server="refuses",
    hint="name a version that is there, or use `version_policy: { latest: { num_versions: 1 } }`",
)
ABSENT = Rule(
    code="TC-652",
    severity="warning",
    says="a version policy that names a version that is not there",
    server="loads the others",
    hint="remove it from the policy, or put the version there",
)
NUMBER = Rule(
    code="TC-652",
    says="a version directory whose name is a number in the server's eyes, and cannot be served under it",
    server="reads `1abc` as 1 and looks for `1/`; ends with SIGABRT on a number of more than 63 bits",
    hint="rename it to a plain number, or take it out of the model's directory",
)
IGNORED = Rule(
    code="TC-652",
    severity="warning",
    says="a directory that looks like a version and is none (`v1`, `01`)",
    server="ignores it",
    hint="versions are plain numbers: 1, 2, 3",
)
RULES = (NONE, POLICY, ABSENT, NUMBER, IGNORED)


def subdirectories(model: Model) -> list[Path]:
    return sorted(path for path in model.directory.iterdir() if path.is_dir() and path.name not in BESIDE)


def versions_there(model: Model) -> dict[int, Path]:
    """Number -> directory, newest first, of those that the server can serve."""
    plain = [path for path in subdirectories(model) if re.fullmatch(r"0|[1-9][0-9]*", path.name)]
    found = {int(path.name): path for path in plain if int(path.name) <= LARGEST}
    return dict(sorted(found.items(), reverse=True))


def loaded_versions(model: Model) -> list[Path]:
    """The directories that the version policy loads, newest first."""
    there = versions_there(model)
    policy = model.config.version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "specific":
        return [
            there[number] for number in sorted(set(policy.specific.versions), reverse=True) if number in there
        ]
    if kind == "latest":
        return list(there.values())[: policy.latest.num_versions]
    # A policy that is there but empty loads all; none at all loads the newest.
    whole = kind == "all" or model.config.HasField("version_policy")
    return list(there.values()) if whole else list(there.values())[:1]


def lint_versions(model: Model) -> Iterator[Finding]:
    names = [finding for path in subdirectories(model) for finding in _name(model, path)]
    yield from names
    there = versions_there(model)
    if not there:
        if not any(finding.severity == "error" for finding in names):
            yield NONE.found(model.name, "no version directory")
        return
    policy = model.config.version_policy
    where = model.where("version_policy")
    known = ", ".join(str(number) for number in sorted(there))
    if not loaded_versions(model):
        yield POLICY.found(where, f"the version policy loads nothing of what is there ({known})")
    elif policy.WhichOneof("policy_choice") == "specific":
        for number in sorted(set(policy.specific.versions) - set(there)):
            yield ABSENT.found(where, f"version {number} is not there; there are {known}")


def _name(model: Model, path: Path) -> Iterator[Finding]:
    name, where = path.name, model.beside(path.name)
    number = re.match(r"\s*[+-]?[0-9]+", name)
    if re.fullmatch(r"0|[1-9][0-9]*", name):
        if int(name) > LARGEST:
            yield NUMBER.found(where, "a version of more than 63 bits")
    elif re.fullmatch(r"0[0-9]+|[vV][0-9.]+", name):
        yield IGNORED.found(where, f"{name!r} is no version")
    elif number and not (len(name) > 1 and name[0] == "0"):
        yield NUMBER.found(where, f"{name!r} is read as version {int(number.group())}")
