"""Lint of the ``inflight_batcher_llm`` layout: the ensemble's wiring, and the paths of the backend's model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from toolchain.core.findings import Finding

BACKEND = "tensorrtllm"
RENDER = "render the repository again"


def lint_ensembles(configs: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings about every ensemble among ``configs`` (directory -> ModelConfig): missing models and loose wires."""
    for name, config in configs.items():
        if config.platform != "ensemble":
            continue
        where = f"{name}/config.pbtxt"
        known = {tensor.name for tensor in config.input}
        needed = {tensor.name for tensor in config.output}
        if not config.ensemble_scheduling.step:
            yield _finding("TC-602", where, "an ensemble without steps", RENDER)
        for step in config.ensemble_scheduling.step:
            other = configs.get(step.model_name)
            if other is None:
                yield _finding("TC-604", where, f"step {step.model_name!r}: no such model beside it", RENDER)
                continue
            yield from _wires(where, step, other, known)
            known |= set(step.output_map.values())
        for tensor in sorted(needed - known):
            yield _finding("TC-602", where, f"no step gives output {tensor!r}")
        if len({item.max_batch_size > 0 for item in configs.values()}) > 1:
            yield _finding("TC-602", where, "max_batch_size is 0 in some of its models only: shapes differ")


def _wires(where: str, step: Any, other: Any, known: set[str]) -> Iterator[Finding]:
    inputs = {tensor.name: tensor for tensor in other.input}
    outputs = {tensor.name for tensor in other.output}
    for mine, source in sorted(step.input_map.items()):
        if mine not in inputs:
            yield _finding("TC-602", where, f"{step.model_name} has no input {mine!r}")
        if source not in known:
            yield _finding("TC-602", where, f"{step.model_name}: nothing before it gives {source!r}")
    for mine in sorted(set(step.output_map) - outputs):
        yield _finding("TC-602", where, f"{step.model_name} has no output {mine!r}")
    for mine, tensor in inputs.items():
        if not tensor.optional and mine not in step.input_map:
            yield _finding("TC-602", where, f"input {mine!r} of {step.model_name} is not connected")


def lint_backend(config: Any, model: Path, *, check_paths: bool) -> list[Finding]:
    """Findings of a model of the TensorRT-LLM backend; an engine that is not there yet is a warning."""
    where = f"{model.name}/config.pbtxt"
    findings = [
        _finding("TC-602", where, f"parameter {name} is missing", RENDER)
        for name in ("gpt_model_type", "gpt_model_path")
        if name not in config.parameters
    ]
    if findings or not check_paths:
        return findings
    engine = Path(config.parameters["gpt_model_path"].string_value)
    if not engine.parent.is_dir():
        findings.append(_finding("TC-610", where, f"gpt_model_path {engine}: its bundle is gone", RENDER))
    elif not (engine / "config.json").is_file():
        message = f"gpt_model_path {engine} holds no engine yet"
        hint = f"trtllm-build makes it: see {engine.parent / 'trtllm_build.json'}"
        findings.append(Finding(code="TC-610", where=where, message=message, hint=hint, severity="warning"))
    return findings


def lint_tokenizer(config: Any, model: Path) -> Iterator[Finding]:
    """The directory of the tokenizer exists, where a model has one."""
    if "tokenizer_dir" in config.parameters:
        directory = Path(config.parameters["tokenizer_dir"].string_value)
        if not directory.is_dir():
            where = f"{model.name}/config.pbtxt"
            yield _finding("TC-610", where, f"tokenizer_dir {directory} does not exist", RENDER)


def _finding(code: str, where: str, message: str, hint: str = "") -> Finding:
    return Finding(code=code, where=where, message=message, hint=hint)
