"""The tensors of one ensemble: each is given once, used, of one type and shape, and of one decoupled origin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.core.findings import Finding
from toolchain.triton.rules.model import Model
from toolchain.triton.rules.rule import Rule

GIVEN = Rule(
    code="TC-602",
    says="a tensor of an ensemble that no step gives, that two steps give, or that nothing uses",
    server="refuses",
)
SHAPE = Rule(
    code="TC-602",
    says="a tensor of an ensemble with two types or shapes",
    server="refuses",
    hint="correct the model that is wrong, or put a step between them",
)
DECOUPLED = Rule(
    code="TC-655",
    says="a step of an ensemble, or its outputs, fed by two decoupled models, or by one and by what is before it",
    server="refuses: the numbers of responses differ",
    hint="take all inputs of a step from one side of the decoupled model",
)
CACHED = Rule(
    code="TC-653",
    says="a response cache for an ensemble with a decoupled step",
    server="refuses",
    hint="remove response_cache",
)
RULES = (GIVEN, SHAPE, DECOUPLED, CACHED)
FIELD = "ensemble_scheduling"


@dataclass(frozen=True, kw_only=True)
class Declared:
    """One model's word about a tensor."""

    owner: str
    data_type: int
    dims: tuple[int, ...]
    batching: bool

    @property
    def whole(self) -> tuple[int, ...]:
        return (-1, *self.dims) if self.batching else self.dims


def lint_flow(model: Model, models: Mapping[str, Model]) -> Iterator[Finding]:
    steps = list(model.config.ensemble_scheduling.step)
    yield from _connected(model, steps)
    yield from _types(model, steps, models)
    yield from _decoupled(model, steps, models)


def _connected(model: Model, steps: list[Any]) -> Iterator[Finding]:
    inputs = [tensor.name for tensor in model.config.input]
    outputs = [tensor.name for tensor in model.config.output]
    used = {name for step in steps for name in step.input_map.values()}
    givers: dict[str, int] = {}
    for index, step in enumerate(steps):
        where = model.where(FIELD, "step", index)
        for name in step.output_map.values():
            if name in givers:
                yield GIVEN.found(where, f"{step.model_name}: a second step that gives {name!r}")
            elif name not in used and name not in outputs:
                message = f"{step.model_name}: nothing uses {name!r}"
                yield GIVEN.found(where, message, "leave it out of output_map")
            givers.setdefault(name, index)
    yield from _unfed(model, steps, set(inputs), set(givers))
    for position, name in enumerate(inputs):
        if name not in used:
            yield GIVEN.found(model.where("input", position), f"no step uses input {name!r}")
    for position, name in enumerate(outputs):
        if name not in givers:
            yield GIVEN.found(model.where("output", position), f"no step gives output {name!r}")


def _unfed(model: Model, steps: list[Any], inputs: set[str], given: set[str]) -> Iterator[Finding]:
    """Tensors that nothing gives; where there are none, steps that wait for each other."""
    ready = _ready(set(inputs), steps)
    needed = [
        (index, name)
        for index, step in enumerate(steps)
        for name in sorted(set(step.input_map.values()) - ready)
    ]
    roots = [(index, name) for index, name in needed if name not in given]
    for index, name in roots or needed:
        what = f"nothing before it gives {name!r}" if roots else f"{name!r} comes of what waits for it"
        yield GIVEN.found(model.where(FIELD, "step", index), f"{steps[index].model_name}: {what}")


def _fed(step: Any, ready: set[str]) -> bool:
    return set(step.input_map.values()) <= ready


def _ready(ready: set[str], steps: list[Any]) -> set[str]:
    """The tensors that there will be, whatever the order of the steps."""
    waiting = list(steps)
    while fed := [step for step in waiting if _fed(step, ready)]:
        for step in fed:
            ready |= set(step.output_map.values())
        waiting = [step for step in waiting if step not in fed]
    return ready


def _types(model: Model, steps: list[Any], models: Mapping[str, Model]) -> Iterator[Finding]:
    said: dict[str, Declared] = {}
    for tensor in [*model.config.input, *model.config.output]:
        dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
        said.setdefault(tensor.name, _declared(model, tensor, dims))
    for index, step in enumerate(steps):
        other = models.get(step.model_name)
        if other is None:
            continue
        where = model.where(FIELD, "step", index)
        sides = ((other.config.input, step.input_map), (other.config.output, step.output_map))
        for tensors, names in sides:
            for tensor in tensors:
                if tensor.name in names and tensor.dims:
                    yield from _agrees(said, names[tensor.name], _declared(other, tensor, tensor.dims), where)


def _declared(model: Model, tensor: Any, dims: Any) -> Declared:
    batching = model.config.max_batch_size > 0
    return Declared(owner=model.name, data_type=tensor.data_type, dims=tuple(dims), batching=batching)


def _agrees(said: dict[str, Declared], name: str, mine: Declared, where: str) -> Iterator[Finding]:
    from tritonclient.grpc import model_config_pb2

    first = said.setdefault(name, mine)
    if first.data_type != mine.data_type:
        kinds = [model_config_pb2.DataType.Name(item.data_type) for item in (first, mine)]
        message = f"{name!r} is {kinds[0]} in {first.owner} and {kinds[1]} in {mine.owner}"
        yield SHAPE.found(where, message)
    if not _fits(first.dims, mine.dims) and not _fits(first.whole, mine.whole):
        message = f"{name!r} is {list(first.whole)} in {first.owner} and {list(mine.whole)} in {mine.owner}"
        yield SHAPE.found(where, message)


def _fits(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _decoupled(model: Model, steps: list[Any], models: Mapping[str, Model]) -> Iterator[Finding]:
    """Each tensor belongs to the last decoupled step before it (0: none); a step and the outputs take one origin."""
    origin = {tensor.name: 0 for tensor in model.config.input}
    waiting = list(enumerate(steps))
    while ready := [item for item in waiting if set(item[1].input_map.values()) <= set(origin)]:
        for index, step in ready:
            before = {origin[name] for name in step.input_map.values()}
            if len(before) > 1:
                where = model.where(FIELD, "step", index)
                yield DECOUPLED.found(where, f"{step.model_name}: inputs of different decoupled origin")
            other = models.get(step.model_name)
            decoupled = other is not None and other.config.model_transaction_policy.decoupled
            for name in step.output_map.values():
                origin.setdefault(name, index + 1 if decoupled else max(before))
        waiting = [item for item in waiting if item not in ready]
    if model.config.response_cache.enable and any(origin.values()):
        yield CACHED.found(model.where("response_cache"), "response_cache, and a step is decoupled")
    ends = {origin[tensor.name] for tensor in model.config.output if tensor.name in origin}
    if len(ends) > 1:
        yield DECOUPLED.found(model.where("output"), "outputs of different decoupled origin")
