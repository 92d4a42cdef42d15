"""Lint of what is particular to each layout: ``llmapi`` (1/model.yaml) and ``local`` (served.json in
each version)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.findings import Finding
from toolchain.triton.served import SERVED, read_served, version_dirs


def lint_llmapi(config: Any, text: str, model: Path, *, check_paths: bool) -> list[Finding]:
    """Findings of the llmapi layout. ``text`` is config.pbtxt: a scalar set to its default does not show in
    ``config``."""
    where = f"{model.name}/config.pbtxt"
    findings = []
    bare = re.sub(r"#.*", "", text)
    for pattern, name in ((r"^\s*max_batch_size\s*:", "max_batch_size"), (r"\bdecoupled\s*:", "decoupled")):
        if re.search(pattern, bare, flags=re.MULTILINE):
            findings.append(
                Finding(
                    code="TC-606",
                    where=where,
                    message=f"{name} is set here; model.py takes it from triton_config in 1/model.yaml",
                    hint="remove it from config.pbtxt",
                )
            )
    if not (model / "1" / "helpers.py").is_file():
        findings.append(Finding(code="TC-604", where=f"{model.name}/1/helpers.py", message="missing"))
    return findings + _lint_model_yaml(model, check_paths=check_paths)


def _lint_model_yaml(model: Path, *, check_paths: bool) -> list[Finding]:
    import yaml

    where = f"{model.name}/1/model.yaml"
    text = (model / "1" / "model.yaml").read_text(encoding="utf-8", errors="replace")
    findings = [
        Finding(code="TC-603", where=f"{where}:{number}", message=f"unfilled placeholder {placeholder}")
        for number, line in enumerate(text.splitlines(), start=1)
        for placeholder in re.findall(r"\$\{[^}]*\}", line)
    ]
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        return [*findings, Finding(code="TC-609", where=where + place, message=str(problem))]
    if not isinstance(document, dict):
        return [
            *findings,
            Finding(code="TC-609", where=where, message="expected a mapping of LLM() arguments"),
        ]
    findings += _lint_triton_config(document.get("triton_config"), where)
    if not isinstance(document.get("model"), str):
        findings.append(Finding(code="TC-609", where=where, message="`model` (path or hub id) is missing"))
    elif check_paths and Path(document["model"]).is_absolute() and not Path(document["model"]).is_dir():
        findings.append(
            Finding(
                code="TC-610",
                where=where,
                message=f"model {document['model']} does not exist on this machine",
                hint="fine if the server sees it under that path; otherwise render again",
                severity="warning",
            )
        )
    if "build_config" in document:
        message = "build_config is refused by the PyTorch backend"
        findings.append(
            Finding(code="TC-609", where=where, message=message, hint="put its keys at the top level")
        )
    return findings


def _lint_triton_config(triton_config: object, where: str) -> list[Finding]:
    if not isinstance(triton_config, dict):
        hint = "expected triton_config: {max_batch_size: 0, decoupled: true}"
        return [Finding(code="TC-609", where=where, message="triton_config is missing", hint=hint)]
    findings = []
    size = triton_config.get("max_batch_size")
    if size != 0 or isinstance(size, bool):
        message = f"triton_config.max_batch_size is {size!r}, expected 0 (TensorRT-LLM batches in flight)"
        findings.append(Finding(code="TC-609", where=where, message=message))
    if triton_config.get("decoupled") is not True:
        message = f"triton_config.decoupled is {triton_config.get('decoupled')!r}, expected true"
        findings.append(Finding(code="TC-609", where=where, message=message, hint="answers come in pieces"))
    period = triton_config.get("cancellation_check_period_ms", 100)
    if not isinstance(period, int) or isinstance(period, bool) or period < 1:
        message = f"triton_config.cancellation_check_period_ms is {period!r}, expected an integer >= 1"
        findings.append(Finding(code="TC-609", where=where, message=message))
    return findings


def lint_local(config: Any, model: Path, *, check_paths: bool) -> list[Finding]:
    """Findings of the local layout: a decoupled model whose engine and interpreter exist."""
    where = f"{model.name}/config.pbtxt"
    findings = []
    if config.max_batch_size != 0 or not config.model_transaction_policy.decoupled:
        message = (
            f"max_batch_size {config.max_batch_size}, decoupled {config.model_transaction_policy.decoupled}; "
            "expected 0 and true: the engine process batches by itself and answers in pieces"
        )
        findings.append(Finding(code="TC-602", where=where, message=message))
    for version in version_dirs(model):
        findings += _lint_local_version(version, f"{model.name}/{version.name}", check_paths=check_paths)
    return findings


def _lint_local_version(version: Path, where: str, *, check_paths: bool) -> list[Finding]:
    again = "render the repository again"
    findings = [
        Finding(code="TC-604", where=f"{where}/{name}", message="missing", hint=again)
        for name in ("helpers.py", "engine_process.py", SERVED)
        if not (version / name).is_file()
    ]
    if not (version / SERVED).is_file():
        return findings
    where = f"{where}/{SERVED}"
    try:
        served = read_served(version)
    except ToolchainError as error:
        return [
            *findings,
            Finding(code=error.code or "TC-602", where=where, message=error.message, hint=again),
        ]
    findings += [
        Finding(
            code="TC-602", where=where, message=f"{key} is {served.get(key)!r}, expected a path", hint=again
        )
        for key in ("engine_dir", "python")
        if not isinstance(served.get(key), str) or not served[key]
    ]
    if findings or not check_paths:
        return findings
    engine, python = Path(served["engine_dir"]), Path(served["python"])
    if not (engine / "engine.json").is_file():
        message = f"engine_dir {engine} holds no engine.json"
        findings.append(Finding(code="TC-610", where=where, message=message, hint=again))
    if not os.access(python, os.X_OK) or not python.is_file():
        message = f"python {python} is not an executable file"
        findings.append(Finding(code="TC-610", where=where, message=message, hint=again))
    return findings
