"""model_warmup: requests that the server makes when a model loads; one that fails keeps the model from loading."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from toolchain.core.findings import Finding
from toolchain.triton.rules.backends import ENSEMBLE, backend_of
from toolchain.triton.rules.model import Model
from toolchain.triton.rules.rule import Rule

WARMUP = Rule(
    code="TC-654",
    says="a warm-up sample that cannot run: inputs missing, free sizes, no data, another type or shape, a batch above "
    "max_batch_size, a file that is not there or too short",
    server="refuses to load the model",
    hint="give every required input with fixed dims and zero_data, random_data or input_data_file",
)
UNKNOWN = Rule(
    code="TC-654",
    severity="warning",
    says="a warm-up sample with an input that the model does not declare, or of batch size 0",
    server="hands it to the model as it is; skips samples of batch size 0",
)
RULES = (WARMUP, UNKNOWN)
BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 4, 12: 8, 14: 2}
"""Bytes of an element by DataType of model_config.proto (BOOL, UINT8..64, INT8..64, FP16..64, BF16); strings vary."""


def lint_warmup(model: Model) -> Iterator[Finding]:
    if backend_of(model) == ENSEMBLE:
        return  # refused altogether, see ensembles.py
    declared = {tensor.name: tensor for tensor in model.config.input}
    for index, sample in enumerate(model.config.model_warmup):
        where, said = model.where("model_warmup", index), f"sample {sample.name!r}"
        if sample.batch_size == 0:
            yield UNKNOWN.found(where, f"{said} has batch_size 0: it is skipped", "set batch_size: 1")
            continue
        largest = max(model.config.max_batch_size, 1)
        if sample.batch_size > largest and model.has("max_batch_size"):
            yield WARMUP.found(
                where, f"{said} has batch_size {sample.batch_size}, max_batch_size is {largest}"
            )
        if declared:
            yield from _names(declared, sample, where, said)
        for name in sorted(sample.inputs):
            yield from _input(model, declared.get(name), name, sample.inputs[name], where, said)


def _names(declared: dict[str, Any], sample: Any, where: str, said: str) -> Iterator[Finding]:
    missing = [name for name, item in declared.items() if not item.optional and name not in sample.inputs]
    if missing:
        yield WARMUP.found(where, f"{said} lacks {', '.join(missing)}")
    unknown = sorted(set(sample.inputs) - set(declared))
    if unknown:
        yield UNKNOWN.found(where, f"{said} has {', '.join(unknown)}, which the model does not declare")


def _input(model: Model, declared: Any, name: str, given: Any, where: str, said: str) -> Iterator[Finding]:
    said = f"{said}, input {name!r}"
    if given.WhichOneof("input_data_type") is None:
        yield WARMUP.found(where, f"{said} has no data")
    if any(size < 1 for size in given.dims):
        yield WARMUP.found(where, f"{said} has dims {list(given.dims)}, expected fixed sizes")
        return
    if declared is not None:
        if given.data_type != declared.data_type:
            yield WARMUP.found(where, f"{said} has another data_type than the model")
        if len(given.dims) != len(declared.dims) or any(
            want not in (-1, size) for want, size in zip(declared.dims, given.dims, strict=True)
        ):
            message = f"{said} has dims {list(given.dims)}, the model {list(declared.dims)}"
            yield WARMUP.found(where, message)
    if given.input_data_file:
        yield from _file(model, given, where, said)


def _file(model: Model, given: Any, where: str, said: str) -> Iterator[Finding]:
    path = model.directory / "warmup" / given.input_data_file
    if not path.is_file():
        yield WARMUP.found(where, f"{said}: no file {model.name}/warmup/{given.input_data_file}")
        return
    needed = prod(given.dims) * BYTES.get(given.data_type, 0)
    if path.stat().st_size < needed:
        message = f"{said}: {given.input_data_file} has {path.stat().st_size} bytes, expected {needed}"
        yield WARMUP.found(where, message)
