"""Inputs and outputs: names, types, dims, reshape, batch inputs and outputs, labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any

from toolchain.core.findings import Finding
from toolchain.triton.rules.backends import KNOWN, backend_of
from toolchain.triton.rules.model import Model
from toolchain.triton.rules.rule import Rule

TENSORRT = ("tensorrt_plan",)
MISSING = Rule(
    code="TC-602",
    says="an input, output or state without name, data_type or dims",
    server="refuses (of a state: loads it, without any check)",
)
DIMS = Rule(
    code="TC-602",
    says="a size in dims or in reshape that is neither >= 1 nor -1",
    server="refuses",
    hint="sizes are >= 1, or -1 for any",
)
TWICE = Rule(
    code="TC-602",
    says="two inputs, or two outputs, of one name",
    server="loads it and knows one of them only",
    hint="give each its own name",
)
RESHAPE = Rule(
    code="TC-602",
    says="dims and reshape with different numbers of elements; an empty reshape without batching",
    server="refuses",
    hint="both shapes hold the same number of elements, between two -1 as well",
)
TENSORRT_ONLY = Rule(
    code="TC-602",
    says="shape tensors or non-linear formats outside of TensorRT; FORMAT_NHWC/NCHW without 3 dims",
    server="refuses",
)
BATCH_IO = Rule(
    code="TC-602",
    says="batch_input or batch_output with unknown tensors, the wrong number of them, or another type",
    server="refuses",
)
UNDECLARED = Rule(
    code="TC-602",
    says="no input and no output, for a backend that cannot complete them",
    server="loads it; no request can be made",
    hint="declare them",
)
RAGGED = Rule(
    code="TC-602",
    severity="warning",
    says="allow_ragged_batch without batching (max_batch_size 0)",
    server="loads it; the setting has no effect",
)
LABELS = Rule(
    code="TC-604",
    says="a label_filename that is not in the model's directory",
    server="refuses",
    hint="put it beside config.pbtxt",
)
RULES = (MISSING, DIMS, TWICE, RESHAPE, TENSORRT_ONLY, BATCH_IO, UNDECLARED, RAGGED, LABELS)


def lint_tensors(model: Model) -> Iterator[Finding]:
    config = model.config
    for kind, tensors in (("input", config.input), ("output", config.output)):
        for name, count in Counter(tensor.name for tensor in tensors).items():
            if name and count > 1:
                last = max(index for index, tensor in enumerate(tensors) if tensor.name == name)
                message = f"{kind} {name!r} is declared {count} times"
                yield TWICE.found(model.where(kind, last, "name"), message)
        for index, tensor in enumerate(tensors):
            yield from _tensor(model, kind, index, tensor)
    yield from _undeclared(model)
    yield from _batch_io(model)


def _undeclared(model: Model) -> Iterator[Finding]:
    config, known = model.config, KNOWN.get(backend_of(model))
    if config.input or config.output or not model.has_config or known is None or known.completes:
        return
    yield UNDECLARED.found(model.file, f"no input and no output for backend {known.name}")


def _tensor(model: Model, kind: str, index: int, tensor: Any) -> Iterator[Finding]:
    config, place = model.config, model.where(kind, index)
    said = f"{kind} {tensor.name!r}"
    if not tensor.name:
        yield MISSING.found(place, f"an {kind} without a name")
    if tensor.data_type == 0:
        yield MISSING.found(place, f"{said} has no data_type")
    if not tensor.dims:
        yield MISSING.found(place, f"{said} has no dims")
    if any(size < 1 and size != -1 for size in tensor.dims):
        yield DIMS.found(model.where(kind, index, "dims"), f"{said} has dims {list(tensor.dims)}")
    if tensor.HasField("reshape"):
        yield from _reshape(model, model.where(kind, index, "reshape"), said, tensor)
    if config.platform not in TENSORRT and backend_of(model) != "tensorrt":
        for name in ("is_shape_tensor", "is_non_linear_format_io"):
            if getattr(tensor, name, False):
                yield TENSORRT_ONLY.found(
                    model.where(kind, index, name), f"{said}: {name} is for TensorRT plans"
                )
    if kind == "input" and tensor.format and len(tensor.dims) != 3:
        message = f"{said}: a format of images with {len(tensor.dims)} dims, expected 3"
        yield TENSORRT_ONLY.found(model.where(kind, index, "format"), message)
    if kind == "input" and tensor.allow_ragged_batch and config.max_batch_size == 0 and model.has_config:
        yield RAGGED.found(model.where(kind, index, "allow_ragged_batch"), f"{said}: no batch is ever made")
    if kind == "output" and tensor.label_filename:
        labels = model.directory / tensor.label_filename
        if not labels.is_file() or model.directory.resolve() not in labels.resolve().parents:
            where = model.where(kind, index, "label_filename")
            yield LABELS.found(where, f"{said}: no file {tensor.label_filename} in {model.name}/")


def _reshape(model: Model, where: str, said: str, tensor: Any) -> Iterator[Finding]:
    dims, shape = list(tensor.dims), list(tensor.reshape.shape)
    if any(size < 1 and size != -1 for size in shape):
        yield DIMS.found(where, f"{said} has reshape {shape}")
    elif not shape and model.config.max_batch_size == 0:
        yield RESHAPE.found(
            where, f"{said} has an empty reshape and max_batch_size is 0: no data would be left"
        )
    elif not all(size == -1 or size > 0 for size in dims):
        return  # has been said
    elif _parts(dims) != _parts(shape):
        yield RESHAPE.found(where, f"{said} has dims {dims} and reshape {shape}")


def _parts(shape: list[int]) -> list[int]:
    """Numbers of elements between the sizes that are free: [2, 4, -1, 6] -> [8, 6]."""
    parts: list[list[int]] = [[]]
    for size in shape:
        if size == -1:
            parts.append([])
        else:
            parts[-1].append(size)
    return [prod(part) for part in parts]


def _batch_io(model: Model) -> Iterator[Finding]:
    config = model.config
    inputs = {tensor.name for tensor in config.input}
    outputs = {tensor.name for tensor in config.output}
    for kind, items in (("batch_input", config.batch_input), ("batch_output", config.batch_output)):
        for index, item in enumerate(items):
            where = model.where(kind, index)
            if len(item.source_input) != 1:
                yield BATCH_IO.found(
                    where, f"{kind} has {len(item.source_input)} source_input, expected exactly 1"
                )
            for name in item.source_input:
                if name not in inputs:
                    yield BATCH_IO.found(where, f"{kind}: no input {name!r}")
            # TYPE_INT32 is 8 and TYPE_FP32 is 11 in model_config.proto.
            if kind == "batch_input" and item.data_type not in (8, 11):
                yield BATCH_IO.found(where, "batch_input has another type than TYPE_INT32 or TYPE_FP32")
            if kind == "batch_output":
                for name, count in Counter(item.target_name).items():
                    if name not in outputs:
                        yield BATCH_IO.found(where, f"batch_output: no output {name!r}")
                    elif count > 1:
                        yield BATCH_IO.found(where, f"batch_output names {name!r} {count} times")
