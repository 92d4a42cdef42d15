"""Lint of a Triton model repository: what its protobuf refuses, what only the server would find, or
nobody."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from toolchain.core.findings import Finding
from toolchain.triton import lint_inflight
from toolchain.triton.lint_layout import lint_llmapi, lint_local
from toolchain.triton.served import SERVED, version_dirs

BACKENDS = (
    "python",
    "tensorrtllm",
    "tensorrt",
    "onnxruntime",
    "pytorch",
    "openvino",
    "dali",
    "fil",
    "identity",
    "vllm",
)
"""Backends of triton-inference-server's repositories."""
PLACEHOLDER = re.compile(r"\$\{[^}]*\}")


def lint_repository(repository: Path, *, check_paths: bool = True) -> list[Finding]:
    """Every finding about the models under ``repository``; ``where`` is relative to it.

    ``check_paths=False`` leaves out whether engine and interpreter exist: the server is on another machine.
    """
    if not repository.is_dir():
        return [_finding("TC-604", str(repository), "no such directory", "render it with `toolchain triton`")]
    models = sorted(path for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not models:
        return [
            _finding(
                "TC-604", str(repository), "it holds no model directory", "render it with `toolchain triton`"
            )
        ]
    findings = [finding for model in models for finding in _lint_model(model, check_paths=check_paths)]
    return [*findings, *_lint_together(models)]


def _lint_together(models: list[Path]) -> list[Finding]:
    """What only shows between models. Those that cannot be read have been reported."""
    configs = {}
    for model in models:
        path = model / "config.pbtxt"
        if path.is_file():
            config, problem = _parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
            if problem is None:
                configs[model.name] = config
    return list(lint_inflight.lint_ensembles(configs))


def _finding(code: str, where: str, message: str, hint: str = "") -> Finding:
    return Finding(code=code, where=where, message=message, hint=hint)


def _lint_model(model: Path, *, check_paths: bool) -> list[Finding]:
    where = f"{model.name}/config.pbtxt"
    if not (model / "config.pbtxt").is_file():
        return [_finding("TC-604", where, "missing", "every model directory holds a config.pbtxt")]
    text = (model / "config.pbtxt").read_text(encoding="utf-8", errors="replace")
    findings = [
        _finding("TC-603", f"{where}:{number}", f"unfilled placeholder {match.group()}")
        for number, line in enumerate(text.splitlines(), start=1)
        for match in PLACEHOLDER.finditer(line.split("#", 1)[0])
    ]
    config, problem = _parse(text, where)
    if problem is not None:
        return [*findings, problem]
    findings += _lint_identity(config, model, where)
    findings += _lint_tensors(config, where)
    findings += _lint_instances(config, where, (model / "1" / "model.yaml").is_file())
    findings += _lint_versions(model, has_code=config.backend == "python")
    if check_paths:
        findings += lint_inflight.lint_tokenizer(config, model)
    if (model / "1" / "model.yaml").is_file():
        findings += lint_llmapi(config, text, model, check_paths=check_paths)
    elif config.backend == lint_inflight.BACKEND:
        findings += lint_inflight.lint_backend(config, model, check_paths=check_paths)
    elif any((version / SERVED).is_file() for version in version_dirs(model)):
        findings += lint_local(config, model, check_paths=check_paths)
    elif config.backend == "python" and config.name == "tensorrt_llm":
        findings.append(
            _finding(
                "TC-604",
                f"{model.name}/1/model.yaml",
                f"missing, and there is no 1/{SERVED} either",
                f"target trtllm needs 1/model.yaml, target local 1/{SERVED}",
            )
        )
    return findings


def _parse(text: str, where: str) -> tuple[Any, Finding | None]:
    """The ModelConfig, or the finding that says at which line and column it stops being one."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig()), None
    except text_format.ParseError as error:
        place = ":".join(str(number) for number in (error.GetLine(), error.GetColumn()) if number is not None)
        message = re.sub(r"^\d+:\d+\s*:\s*", "", str(error))
        return None, _finding("TC-601", f"{where}:{place}" if place else where, message)


def _lint_identity(config: Any, model: Path, where: str) -> list[Finding]:
    findings = []
    if config.name and config.name != model.name:
        findings.append(_finding("TC-605", where, f"name {config.name!r} in directory {model.name!r}"))
    if not config.backend and not config.platform:
        findings.append(_finding("TC-607", where, "no backend", 'expected `backend: "python"`'))
    elif config.backend and config.backend not in BACKENDS:
        findings.append(
            _finding(
                "TC-607",
                where,
                f"backend {config.backend!r}; known: {', '.join(BACKENDS)}",
                "check the spelling",
            )
        )
    if config.max_batch_size < 0:
        findings.append(_finding("TC-602", where, f"max_batch_size {config.max_batch_size}, expected >= 0"))
    return findings


def _lint_tensors(config: Any, where: str) -> list[Finding]:
    findings = []
    for kind, tensors in (("input", config.input), ("output", config.output)):
        for name, count in Counter(tensor.name for tensor in tensors).items():
            if not name:
                findings.append(_finding("TC-602", where, f"an {kind} without a name"))
            elif count > 1:
                findings.append(_finding("TC-602", where, f"{kind} {name!r} is declared {count} times"))
        if not tensors:
            findings.append(_finding("TC-602", where, f"no {kind} is declared"))
        for tensor in tensors:
            findings += _lint_tensor(kind, tensor, where)
    return findings


def _lint_tensor(kind: str, tensor: Any, where: str) -> list[Finding]:
    findings = []
    dims = list(tensor.dims)
    if not dims:
        findings.append(_finding("TC-602", where, f"{kind} {tensor.name!r} has no dims"))
    if any(size < 1 and size != -1 for size in dims):
        findings.append(
            _finding(
                "TC-602", where, f"{kind} {tensor.name!r} has dims {dims}", "sizes are >= 1, or -1 for any"
            )
        )
    if tensor.data_type == 0:
        findings.append(_finding("TC-602", where, f"{kind} {tensor.name!r} has no data_type"))
    return findings


def _lint_instances(config: Any, where: str, llmapi: bool) -> list[Finding]:
    findings = [
        _finding("TC-602", where, f"instance_group count {group.count}, expected >= 1")
        for group in config.instance_group
        if group.count < 0
    ]
    lists = config.parameters["gpu_device_ids"].string_value if "gpu_device_ids" in config.parameters else ""
    instances = sum(group.count or 1 for group in config.instance_group) or 1
    groups = [part.strip() for part in lists.split(";")] if lists else []
    if lists and any(not re.fullmatch(r"\d+(\s*,\s*\d+)*", part) for part in groups):
        findings.append(_finding("TC-608", where, f"gpu_device_ids {lists!r}", 'expected the form "0,1;2,3"'))
    elif lists and len(groups) != instances:
        findings.append(
            _finding(
                "TC-608", where, f"{instances} instances but gpu_device_ids {lists!r} lists {len(groups)}"
            )
        )
    elif lists and len(ids := [item for part in groups for item in part.replace(" ", "").split(",")]) != len(
        set(ids)
    ):
        findings.append(_finding("TC-608", where, f"gpu_device_ids {lists!r} names a GPU twice"))
    elif not lists and instances > 1 and llmapi:  # instances of target local may share CPUs
        findings.append(
            _finding("TC-608", where, f"{instances} instances without the parameter gpu_device_ids")
        )
    return findings


def _lint_versions(model: Path, *, has_code: bool) -> list[Finding]:
    """``has_code``: the version directories hold a model.py, as those of the Python backend do."""
    versions = version_dirs(model)
    if not versions:
        return [_finding("TC-604", model.name, "no version directory", "expected a directory 1/")]
    return [
        _finding("TC-604", f"{model.name}/{version.name}/model.py", "missing")
        for version in versions
        if has_code and not (version / "model.py").is_file()
    ]
