"""What stands in the directory of a repository: models, and what the server would take for one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from toolchain.core.findings import Finding
from toolchain.triton.rules.model import CONFIG, UNREADABLE
from toolchain.triton.rules.rule import Rule

EMPTY = Rule(
    code="TC-604",
    says="no such directory, or none that holds a model",
    server="refuses a missing directory; starts with an empty one and serves nothing",
    hint="render it with `toolchain triton`",
)
NO_MODEL = Rule(
    code="TC-604",
    says="a directory with neither config.pbtxt nor a version directory",
    server="refuses to start, hidden directories such as `.git` included; with explicit model control it is ignored",
    hint="move it out of the repository",
)
RULES = (EMPTY, NO_MODEL)


def is_model(directory: Path) -> bool:
    """Whether it is a model's directory itself, given in place of its repository."""
    if (directory / CONFIG).is_file():
        return True
    return any(path.is_dir() and re.fullmatch(r"[1-9][0-9]*", path.name) for path in directory.iterdir())


def read_repository(repository: Path) -> tuple[list[Path], list[Finding]]:
    """The models' directories, sorted, and what else stands there and should not."""
    if not repository.is_dir():
        return [], [EMPTY.found(str(repository), "no such directory")]
    try:
        if is_model(repository):
            return [repository.resolve()], []
        entries = sorted(repository.iterdir())
    except OSError as error:
        return [], [UNREADABLE.found(str(repository), f"cannot be read: {error.strerror or error}")]
    models, findings = [], []
    for path in entries:
        if path.is_symlink() and not path.exists():
            findings.append(UNREADABLE.found(path.name, "a link to nothing"))
        elif path.is_dir():
            problem = _no_model(path)
            models += [] if problem else [path]
            findings += [problem] if problem else []
    if not models and not findings:
        findings.append(EMPTY.found(str(repository), "it holds no model directory"))
    return models, findings


def _no_model(path: Path) -> Finding | None:
    """None for a directory that is a model, or means to be one."""
    try:
        inside = list(path.iterdir())
        if (path / CONFIG).exists() or any(
            re.match(r"[0-9]", item.name) and item.is_dir() for item in inside
        ):
            return None
        nested = any((item / CONFIG).is_file() for item in inside if item.is_dir())
    except OSError as error:
        return UNREADABLE.found(path.name, f"cannot be read: {error.strerror or error}")
    where = f"{path.name}/{CONFIG}"
    if nested:
        return NO_MODEL.found(
            where, "missing; the models are one level below", f"give {path.name}/ as repository"
        )
    return NO_MODEL.found(where, "missing, and no version directory either")


def dangling(directory: Path) -> Iterator[Finding]:
    """Links to nothing below a model's directory: the server looks at each file's time before it loads."""
    for path in sorted(directory.iterdir()):
        if path.is_symlink() and not path.exists():
            yield UNREADABLE.found(f"{directory.name}/{path.name}", "a link to nothing")
