"""Lint of a Triton model repository, ours or not: what its protobuf refuses, what the server would find only when it
loads, and what it loads and cannot serve. The rules stand in ``rules/``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolchain.core.findings import Finding
from toolchain.targets.version import parse_version
from toolchain.triton.contract import MODEL_NAME
from toolchain.triton.rules.backends import backend_of, lint_backend
from toolchain.triton.rules.batching import lint_batching
from toolchain.triton.rules.endpoints import Endpoints, endpoints
from toolchain.triton.rules.ensembles import lint_ensembles
from toolchain.triton.rules.inflight import BACKEND as INFLIGHT
from toolchain.triton.rules.inflight import lint_inflight, lint_tokenizer
from toolchain.triton.rules.instances import lint_gpu_lists, lint_instances
from toolchain.triton.rules.llmapi import BESIDE, YAML, lint_llmapi
from toolchain.triton.rules.local import lint_local
from toolchain.triton.rules.model import UNREADABLE, Model, read_config, read_model
from toolchain.triton.rules.parameters import lint_parameters
from toolchain.triton.rules.repository import dangling, read_repository
from toolchain.triton.rules.table import NAME
from toolchain.triton.rules.tensors import lint_tensors
from toolchain.triton.rules.versions import lint_versions, loaded_versions, versions_there
from toolchain.triton.rules.warmup import lint_warmup
from toolchain.triton.served import SERVED


@dataclass(frozen=True, kw_only=True)
class Lint:
    findings: list[Finding]
    """By file, line and column."""
    models: list[Endpoints]
    """The models that could be read, and how each can be called."""


def lint_repository(repository: Path, *, check_paths: bool = True, release: str = "") -> list[Finding]:
    """Every finding about the models under ``repository``; ``where`` is relative to it."""
    return read_and_lint(repository, check_paths=check_paths, release=release).findings


def read_and_lint(repository: Path, *, check_paths: bool = True, release: str = "") -> Lint:
    """``repository`` may also be the directory of one model.

    ``check_paths=False`` leaves out whether engine and interpreter exist: the server is on another machine.
    ``release``: of TensorRT-LLM, for the keys of model.yaml; UsageError TC-106 where it is none.
    """
    if release:
        parse_version(release)
    directories, findings = read_repository(repository)
    models: dict[str, Model] = {}
    for directory in directories:
        try:
            model, found = _read(directory)
            findings += found
            if model is not None:
                models[directory.name] = model
                findings += _lint_model(model, check_paths=check_paths, release=release)
        except OSError as error:
            # A finding of its model, not the end of the lint.
            message = f"{error.filename or directory} cannot be read: {error.strerror or error}"
            findings.append(UNREADABLE.found(directory.name, message))
            models.pop(directory.name, None)
    names = {directory.name for directory in directories}
    findings += lint_ensembles(models, frozenset(names - set(models)))
    return Lint(findings=sorted(findings, key=_order), models=endpoints(models))


def _read(directory: Path) -> tuple[Model | None, list[Finding]]:
    model, findings = read_model(directory)
    findings += dangling(directory)
    configs = directory / "configs"
    for path in sorted(configs.glob("*.pbtxt")) if configs.is_dir() else ():
        findings += read_config(directory, path)[1]  # chosen with --model-config-name
    return model, findings


def _lint_model(model: Model, *, check_paths: bool, release: str) -> Iterator[Finding]:
    loaded = loaded_versions(model)
    if model.config.name and model.config.name != model.name:
        message = f"name {model.config.name!r} in directory {model.name!r}"
        yield NAME.found(model.where("name"), message)
    if not model.config.model_repository_agents.agents:  # an agent may put the files elsewhere
        yield from lint_backend(model, loaded)
        yield from lint_versions(model)
    for rules in (lint_tensors, lint_batching, lint_instances, lint_warmup):
        yield from rules(model)
    yield from lint_parameters(model, check_paths=check_paths)
    if check_paths:
        yield from lint_tokenizer(model)
    yield from _lint_layout(model, check_paths=check_paths, release=release)


def _lint_layout(model: Model, *, check_paths: bool, release: str) -> Iterator[Finding]:
    """What is particular to the layout that the files tell."""
    versions = list(versions_there(model).values())
    llmapi = [path for path in versions if (path / YAML).exists()] if backend_of(model) == "python" else []
    local = any((path / SERVED).exists() for path in versions)
    for version in llmapi:
        yield from lint_llmapi(model, version, release=release, check_paths=check_paths)
    if llmapi:
        return
    yield from lint_gpu_lists(model, is_llmapi=False, ranks=0)
    if backend_of(model) == INFLIGHT:
        yield from lint_inflight(model, check_paths=check_paths)
    elif local or any((path / "engine_process.py").exists() for path in versions):
        yield from lint_local(model, versions, check_paths=check_paths)
    elif model.name == MODEL_NAME and any((path / "helpers.py").exists() for path in versions):
        where = model.beside(f"{versions[0].name}/{YAML}")
        yield BESIDE.found(where, f"missing, and there is no {SERVED} either")


def _order(finding: Finding) -> tuple[object, ...]:
    """By file, then line and column as numbers."""
    file, *place = finding.where.split(":", 3)
    numbers = [int(part) if part.isdigit() else 0 for part in place[:2]]
    return (file, *numbers, *[0] * (2 - len(numbers)), finding.code, finding.message)
