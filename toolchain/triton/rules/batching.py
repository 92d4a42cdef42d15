"""max_batch_size, dynamic batching and its queues, sequence batching, response cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from toolchain.core.findings import Finding
from toolchain.triton.rules.model import Model
from toolchain.triton.rules.rule import Rule

SIZE = Rule(code="TC-602", says="max_batch_size below 0", server="refuses", hint="0: no batching")
PREFERRED = Rule(
    code="TC-653",
    says="a preferred_batch_size that is not between 1 and max_batch_size",
    server="refuses",
    hint="without the setting the server prefers max_batch_size",
)
PRIORITY = Rule(
    code="TC-653",
    says="priority levels out of range; more than one, or the action DELAY, with preserve_ordering",
    server="refuses",
)
NO_BATCH = Rule(
    code="TC-653",
    severity="warning",
    says="dynamic batching with max_batch_size 0",
    server="loads it and batches nothing (it still queues)",
    hint="set max_batch_size, or remove dynamic_batching",
)
CONTROL = Rule(
    code="TC-653",
    says="control inputs of a sequence batcher without name, given twice, or with the wrong values or types",
    server="refuses",
)
STATE = Rule(
    code="TC-653",
    says="a state of a sequence batcher without names, or an initial state that does not fit it",
    server="refuses; loads it where a name or type is missing; ends where an initial state has free sizes",
)
DIRECT = Rule(code="TC-653", says="minimum_slot_utilization outside of 0 to 1", server="refuses")
CACHE = Rule(
    code="TC-653",
    says="a response cache for a decoupled model or one with sequences",
    server="refuses",
    hint="remove response_cache",
)
RULES = (SIZE, PREFERRED, PRIORITY, NO_BATCH, CONTROL, STATE, DIRECT, CACHE)
BOOLEAN = ("CONTROL_SEQUENCE_START", "CONTROL_SEQUENCE_END", "CONTROL_SEQUENCE_READY")
ID_TYPES = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")
VALUES = ("int32_false_true", "fp32_false_true", "bool_false_true")
DELAY = 1
"""ModelQueuePolicy.TimeoutAction DELAY."""


def lint_batching(model: Model) -> Iterator[Finding]:
    config = model.config
    if config.max_batch_size < 0:
        yield SIZE.found(
            model.where("max_batch_size"), f"max_batch_size {config.max_batch_size}, expected >= 0"
        )
    if config.HasField("dynamic_batching"):
        yield from _dynamic(model)
    if config.HasField("sequence_batching"):
        yield from _sequence(model)
    if config.response_cache.enable:
        for reason, given in (
            ("decoupled", config.model_transaction_policy.decoupled),
            ("sequence_batching", config.HasField("sequence_batching")),
        ):
            if given:
                yield CACHE.found(model.where("response_cache"), f"response_cache with {reason}")


def _preferred(model: Model, sizes: Any, *path: str) -> Iterator[Finding]:
    largest = model.config.max_batch_size
    for index, size in enumerate(sizes):
        if not 1 <= size <= max(largest, 0):
            message = f"preferred_batch_size {size}, expected 1 to max_batch_size {largest}"
            yield PREFERRED.found(model.where(*path, "preferred_batch_size", index), message)


def _dynamic(model: Model) -> Iterator[Finding]:
    batching, field = model.config.dynamic_batching, "dynamic_batching"
    yield from _preferred(model, batching.preferred_batch_size, field)
    # Unset, a backend may still complete it.
    if model.config.max_batch_size == 0 and model.has("max_batch_size") and not batching.preferred_batch_size:
        yield NO_BATCH.found(model.where(field), "dynamic_batching with max_batch_size 0")
    levels = batching.priority_levels
    if levels:
        if not 1 <= batching.default_priority_level <= levels:
            message = f"default_priority_level {batching.default_priority_level}, expected 1 to {levels}"
            yield PRIORITY.found(model.where(field, "default_priority_level"), message)
        for level in sorted(batching.priority_queue_policy):
            if not 1 <= level <= levels:
                message = f"a queue policy for priority {level}, expected 1 to {levels}"
                yield PRIORITY.found(model.where(field, "priority_queue_policy"), message)
    if batching.preserve_ordering:
        where = model.where(field, "preserve_ordering")
        if levels > 1:
            yield PRIORITY.found(where, f"preserve_ordering with {levels} priority levels, expected 1")
        policies = [batching.default_queue_policy, *batching.priority_queue_policy.values()]
        if any(item.default_timeout_microseconds and item.timeout_action == DELAY for item in policies):
            yield PRIORITY.found(where, "preserve_ordering with the timeout action DELAY")


def _sequence(model: Model) -> Iterator[Finding]:
    batcher, field = model.config.sequence_batching, "sequence_batching"
    yield from _controls(model, batcher.control_input, field)
    yield from _preferred(model, batcher.oldest.preferred_batch_size, field, "oldest")
    share = batcher.direct.minimum_slot_utilization
    if not 0.0 <= share <= 1.0:
        where = model.where(field, "direct", "minimum_slot_utilization")
        yield DIRECT.found(where, f"minimum_slot_utilization {share:g}, expected 0 to 1")
    for index, state in enumerate(batcher.state):
        yield from _state(model, state, field, "state", index)


def _controls(model: Model, controls: Any, field: str) -> Iterator[Finding]:
    names: set[str] = set()
    kinds: set[str] = set()
    for index, item in enumerate(controls):
        where = model.where(field, "control_input", index)
        if not item.name:
            yield CONTROL.found(where, "a control input without a name")
        elif item.name in names:
            yield CONTROL.found(where, f"control input {item.name!r} is given twice")
        names.add(item.name)
        for control in item.control:
            kind = control.Kind.Name(control.kind)
            if kind in kinds:
                yield CONTROL.found(where, f"a second {kind}")
            kinds.add(kind)
            yield from _control(where, control, kind)


def _control(where: str, control: Any, kind: str) -> Iterator[Finding]:
    from tritonclient.grpc import model_config_pb2

    given = {name: len(getattr(control, name)) for name in VALUES if getattr(control, name)}
    if kind in BOOLEAN:
        if len(given) != 1 or set(given.values()) != {2}:
            said = ", ".join(f"{name} with {count}" for name, count in given.items()) or "none"
            yield CONTROL.found(where, f"{kind}: {said}; expected one of {', '.join(VALUES)} with 2 values")
        return
    if given:
        yield CONTROL.found(where, f"{kind} takes no {', '.join(given)}")
    data_type = model_config_pb2.DataType.Name(control.data_type)
    if data_type not in ID_TYPES:
        yield CONTROL.found(where, f"{kind} has {data_type}, expected one of {', '.join(ID_TYPES)}")


def _state(model: Model, state: Any, *path: str | int) -> Iterator[Finding]:
    where = model.where(*path)
    said = f"state {state.input_name or '?'}"
    if not (state.input_name and state.output_name and state.data_type and state.dims):
        yield STATE.found(where, f"{said}: expected input_name, output_name, data_type and dims")
    for initial in state.initial_state:
        where = model.where(*path, "initial_state")
        if not initial.name:
            yield STATE.found(where, f"{said}: an initial_state without a name")
        if initial.data_type != state.data_type:
            yield STATE.found(where, f"{said}: its initial_state has another data_type")
        if any(size < 1 for size in initial.dims):
            yield STATE.found(where, f"{said}: its initial_state has free sizes {list(initial.dims)}")
        elif len(initial.dims) != len(state.dims) or any(
            want not in (-1, size) for want, size in zip(state.dims, initial.dims, strict=True)
        ):
            message = f"{said}: initial_state has dims {list(initial.dims)}, the state {list(state.dims)}"
            yield STATE.found(where, message)
        if initial.data_file and not (model.directory / "initial_state" / initial.data_file).is_file():
            yield STATE.found(where, f"{said}: no file {model.name}/initial_state/{initial.data_file}")
