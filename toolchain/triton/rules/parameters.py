"""Parameters that the Python backend reads itself, and metrics of the server about a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from toolchain.core.findings import Finding
from toolchain.triton.rules.backends import backend_of
from toolchain.triton.rules.model import Model
from toolchain.triton.rules.rule import Rule

ENVIRONMENT = Rule(
    code="TC-610",
    says="EXECUTION_ENV_PATH of the Python backend names nothing",
    server="refuses",
    hint="`$$TRITON_MODEL_DIRECTORY` stands for the model's directory",
)
ENVIRONMENT_ELSEWHERE = Rule(
    code="TC-610",
    severity="warning",
    says="EXECUTION_ENV_PATH is outside of the repository and not on this machine",
    server="refuses where it is not there",
    hint="fine if the server sees it under that path",
)
FORCE_CPU = Rule(
    code="TC-602",
    says="FORCE_CPU_ONLY_INPUT_TENSORS is neither yes nor no",
    server="refuses",
    hint="expected yes or no",
)
METRICS = Rule(
    code="TC-602",
    says="model_metrics without a metric's family or its buckets",
    server="refuses, as it does every model_metrics: newer servers know them",
)
RULES = (ENVIRONMENT, ENVIRONMENT_ELSEWHERE, FORCE_CPU, METRICS)
HERE = "$$TRITON_MODEL_DIRECTORY"


def lint_parameters(model: Model, *, check_paths: bool) -> Iterator[Finding]:
    for index, item in enumerate(model.config.model_metrics.metric_control):
        if not item.metric_identifier.family or not item.histogram_options.buckets:
            where = model.where("model_metrics", "metric_control", index)
            yield METRICS.found(where, "expected metric_identifier.family and histogram_options.buckets")
    if backend_of(model) != "python":
        return
    force, key = model.parameter("FORCE_CPU_ONLY_INPUT_TENSORS"), "FORCE_CPU_ONLY_INPUT_TENSORS"
    if force and force not in ("yes", "no"):
        yield FORCE_CPU.found(model.at_entry("parameters", key), f"{key} is {force!r}")
    key = "EXECUTION_ENV_PATH"
    given = model.parameter(key)
    where = model.at_entry("parameters", key)
    if given.startswith(HERE):
        if not Path(given.replace(HERE, str(model.directory), 1)).exists():
            yield ENVIRONMENT.found(where, f"{given} does not exist")
    elif given and check_paths and not Path(given).exists():
        yield ENVIRONMENT_ELSEWHERE.found(where, f"{key} {given} does not exist on this machine")
