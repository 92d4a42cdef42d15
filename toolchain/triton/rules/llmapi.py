"""TensorRT-LLM's ``llmapi`` layout: what belongs in 1/model.yaml, and its keys by release."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from toolchain.build.llmapi import argument_findings, read_records
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json
from toolchain.core.findings import Finding, errors
from toolchain.targets.version import parse_version
from toolchain.triton.rules.instances import lint_gpu_lists
from toolchain.triton.rules.model import Model, placeholders, read_bytes
from toolchain.triton.rules.rule import Rule
from toolchain.triton.rules.yaml_places import Document, read_document

YAML = "model.yaml"
MAX_YAML_BYTES = 4 * 2**20
OURS = ("model", "triton_config")
"""Keys that the layout's model.py takes for itself or passes as the first argument."""
MISPLACED = Rule(
    code="TC-606",
    says="max_batch_size or decoupled in config.pbtxt of the llmapi layout",
    server="loads it; model.py overwrites or contradicts them",
    hint="remove it from config.pbtxt: model.py takes it from triton_config in 1/model.yaml",
)
BESIDE = Rule(
    code="TC-604",
    says="helpers.py or model.yaml of the llmapi layout is missing",
    server="refuses",
    hint="render it again",
)
SETTINGS = Rule(
    code="TC-609",
    says="model.yaml is no YAML mapping, gives a key twice, lacks `model`, or has triton_config without "
    "max_batch_size 0 and decoupled",
    server="model.py fails, or its answers do",
)
GONE = Rule(
    code="TC-610",
    severity="warning",
    says="the checkpoint that model.yaml names is not on this machine",
    server="model.py fails where it is not there",
    hint="fine if the server sees it under that path; otherwise render again",
)
KEYS = Rule(
    code="TC-404",
    says="a key or value in model.yaml that this release of TensorRT-LLM does not take (also TC-405, TC-406); without "
    "a known release: that none takes",
    server="`LLM()` refuses the arguments",
    hint="give the release with --version",
)
LIMITS = Rule(
    code="TC-656",
    severity="warning",
    says="max_batch_size, max_seq_len or max_num_tokens in model.yaml above what the engine was planned for",
    server="may run out of memory: the plan counted with less",
    hint="plan and build the engine with these limits",
)
RULES = (MISPLACED, BESIDE, SETTINGS, GONE, KEYS, LIMITS)


def lint_llmapi(model: Model, version: Path, *, release: str, check_paths: bool) -> Iterator[Finding]:
    """``release``: of TensorRT-LLM; empty: that of engine.json beside the checkpoint, where there is one."""
    for path in (("max_batch_size",), ("model_transaction_policy", "decoupled")):
        node = model.places.find(*path)
        if model.has(path[0]) and path[-1] in model.places.find(*path[:-1]).fields:
            yield MISPLACED.found(f"{model.file}:{node.place}", f"{path[-1]} is set here")
    where = model.beside(version.name)
    if not (version / "helpers.py").is_file():
        yield BESIDE.found(f"{where}/helpers.py", "missing")
    where = f"{where}/{YAML}"
    raw, problem = read_bytes(version / YAML, where, limit=MAX_YAML_BYTES)
    if problem is not None:
        yield problem
        return
    text = raw.decode("utf-8", errors="replace")
    yield from placeholders(text, where)
    document, problems = read_document(text)
    yield from (SETTINGS.found(f"{where}{place}", message) for place, message in problems)
    if document is None:
        return
    yield from _settings(document, where)
    yield from _arguments(model, document, where, release=release, check_paths=check_paths)


def _arguments(
    model: Model, document: Document, where: str, *, release: str, check_paths: bool
) -> Iterator[Finding]:
    values = document.values
    checkpoint = values.get("model")
    manifest: Mapping[str, Any] = {}
    if not isinstance(checkpoint, str):
        yield SETTINGS.found(where, "`model` (path or hub id) is missing")
    elif Path(checkpoint).is_absolute():
        if check_paths and not Path(checkpoint).is_dir():
            place = f"{where}{document.place('model')}"
            yield GONE.found(place, f"model {checkpoint} does not exist on this machine")
        manifest = _manifest(Path(checkpoint).parent)
    yield from _limits(document, manifest, where)
    yield from _keys(document, release or _release(manifest), where)
    sizes = [values.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
    ranks = sizes[0] * sizes[1] if all(isinstance(size, int) for size in sizes) else 0
    yield from lint_gpu_lists(model, is_llmapi=True, ranks=ranks)


def _manifest(engine: Path) -> Mapping[str, Any]:
    try:
        found = read_json(engine / "engine.json")
    except (ToolchainError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _release(manifest: Mapping[str, Any]) -> str:
    """That of engine.json; empty where it has none that is one."""
    given = str(manifest.get("target_version") or "")
    try:
        parse_version(given)
    except UsageError:
        return ""
    return given


def _settings(document: Document, where: str) -> Iterator[Finding]:
    settings = document.values.get("triton_config")
    place = f"{where}{document.place('triton_config')}"
    if not isinstance(settings, dict):
        hint = "expected triton_config: {max_batch_size: 0, decoupled: true}"
        yield SETTINGS.found(place, "triton_config is missing", hint)
        return
    size, period = settings.get("max_batch_size"), settings.get("cancellation_check_period_ms", 100)
    if size != 0 or isinstance(size, bool):
        message = f"triton_config.max_batch_size is {size!r}, expected 0 (TensorRT-LLM batches in flight)"
        yield SETTINGS.found(place, message)
    if settings.get("decoupled") is not True:
        message = f"triton_config.decoupled is {settings.get('decoupled')!r}, expected true"
        yield SETTINGS.found(place, message, "answers come in pieces")
    if not isinstance(period, int) or isinstance(period, bool) or period < 1:
        message = f"triton_config.cancellation_check_period_ms is {period!r}, expected an integer >= 1"
        yield SETTINGS.found(place, message)
    if "build_config" in document.values:
        place = f"{where}{document.place('build_config')}"
        yield SETTINGS.found(
            place, "build_config is refused by the PyTorch backend", "put its keys at the top level"
        )


def _limits(document: Document, manifest: Mapping[str, Any], where: str) -> Iterator[Finding]:
    limits = manifest.get("limits")
    for name, planned in (limits if isinstance(limits, dict) else {}).items():
        given = document.values.get(name)
        if isinstance(given, int) and isinstance(planned, int) and given > planned:
            message = f"{name} is {given}, the engine was planned for {planned}"
            yield LIMITS.found(f"{where}{document.place(name)}", message)


def _keys(document: Document, release: str, where: str) -> Iterator[Finding]:
    arguments = {
        str(key): value
        for key, value in document.values.items()
        if key not in OURS and key != "build_config" and not re.search(r"\$\{", str(value))
    }
    if not arguments:
        return
    if release:
        findings = argument_findings(arguments, release, where=where)
    else:
        # Which release will run it is unknown: only what none of them takes is an error.
        tried = [errors(argument_findings(arguments, record.since, where=where)) for record in read_records()]
        everywhere = set.intersection(*({item.where for item in found} for found in tried))
        findings = [item for item in tried[-1] if item.where in everywhere]
    for item in findings:
        path = item.where.removeprefix(f"{where}: ")
        place = document.place(*path.replace("[", ".").split(".")) if path != item.where else ""
        shown = f"{where}{place}: {path}" if place else item.where
        yield Finding(
            code=item.code, where=shown, message=item.message, hint=item.hint, severity=item.severity
        )
