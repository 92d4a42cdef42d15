"""Ensembles: what one declares by itself, and how its steps fit the models beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from toolchain.core.findings import Finding
from toolchain.triton.rules.backends import ENSEMBLE, backend_of
from toolchain.triton.rules.flow import lint_flow
from toolchain.triton.rules.model import Model
from toolchain.triton.rules.rule import Rule
from toolchain.triton.rules.versions import versions_there

OUTSIDE = Rule(
    code="TC-602",
    says="ensemble_scheduling and platform without each other; an ensemble with backend, instance_group, optimization "
    "or model_warmup",
    server="refuses",
    hint='an ensemble has `platform: "ensemble"` and ensemble_scheduling, and none of the others',
)
STEP = Rule(
    code="TC-602",
    says="an ensemble without steps; a step without model_name, input_map or output_map",
    server="refuses",
)
MODEL = Rule(
    code="TC-604",
    says="a step's model, or the version of it that is asked for, is not in the repository",
    server="refuses",
    hint="put it beside the ensemble, or correct the step; model_version -1 takes the newest",
)
MAPPED = Rule(
    code="TC-602",
    says="a step that maps an input or output that its model does not have, or leaves out a required input",
    server="refuses",
)
BATCH = Rule(
    code="TC-602",
    says="an ensemble with a larger max_batch_size than one of its models",
    server="refuses",
    hint="the smallest max_batch_size of its steps is the largest of the ensemble",
)
BATCH_MIXED = Rule(
    code="TC-602",
    severity="warning",
    says="an ensemble where max_batch_size is 0 in some of its models only",
    server="loads it where the shapes may fit; batches above 1 then fail",
    hint="give all of them a max_batch_size, or none",
)
CIRCLE = Rule(code="TC-602", says="ensembles that contain each other", server="refuses")
RULES = (OUTSIDE, STEP, MODEL, MAPPED, BATCH, BATCH_MIXED, CIRCLE)
FIELD = "ensemble_scheduling"


def lint_ensembles(models: Mapping[str, Model], unread: frozenset[str]) -> Iterator[Finding]:
    """``models``: directory -> model. ``unread``: models that are there and could not be read, which was reported."""
    for model in models.values():
        scheduled = model.config.HasField(FIELD)
        if backend_of(model) != ENSEMBLE:
            if scheduled:
                yield OUTSIDE.found(model.where(FIELD), f"{FIELD} with platform {model.config.platform!r}")
            continue
        yield from _alone(model, scheduled=scheduled)
        steps = list(model.config.ensemble_scheduling.step)
        whole = [step for step in steps if step.model_name and step.input_map and step.output_map]
        if not steps or whole != steps:
            continue
        for index, step in enumerate(steps):
            yield from _step(model, step, index, models, unread)
        yield from lint_flow(model, models)
    yield from _circles(models)


def _alone(model: Model, *, scheduled: bool) -> Iterator[Finding]:
    config = model.config
    if not scheduled:
        yield OUTSIDE.found(model.where("platform"), f"an ensemble without {FIELD}")
        return
    for field in ("backend", "instance_group", "optimization", "model_warmup"):
        if model.has(field):
            yield OUTSIDE.found(model.where(field), f"an ensemble with {field}")
    if not config.ensemble_scheduling.step:
        yield STEP.found(model.where(FIELD), "an ensemble without steps")
    for index, step in enumerate(config.ensemble_scheduling.step):
        for field in ("model_name", "input_map", "output_map"):
            if not getattr(step, field):
                yield STEP.found(model.where(FIELD, "step", index), f"step {index} has no {field}")


def _step(
    model: Model, step: Any, index: int, models: Mapping[str, Model], unread: frozenset[str]
) -> Iterator[Finding]:
    where = model.where(FIELD, "step", index)
    other = models.get(step.model_name)
    if other is None:
        # One of another repository of the same server has a namespace.
        if step.model_name not in unread and not step.model_namespace:
            yield MODEL.found(where, f"step {step.model_name!r}: no such model beside it")
        return
    # Unset it is 0, and that is a version too.
    if step.model_version >= 0 and step.model_version not in versions_there(other):
        yield MODEL.found(where, f"step {step.model_name!r}: it has no version {step.model_version}")
    yield from _batch(model, other, where)
    if other.config.input or other.config.output:
        yield from _maps(step, other, where)


def _batch(model: Model, other: Model, where: str) -> Iterator[Finding]:
    mine, theirs = model.config.max_batch_size, other.config.max_batch_size
    if not other.has("max_batch_size") and not other.config.input:
        return  # its backend completes it
    if 0 < theirs < mine:
        yield BATCH.found(where, f"max_batch_size {mine}, and {other.name} has {theirs}")
    elif (theirs > 0) != (mine > 0):
        yield BATCH_MIXED.found(
            where, f"max_batch_size is {mine}, and {theirs} in {other.name}: shapes differ"
        )


def _maps(step: Any, other: Model, where: str) -> Iterator[Finding]:
    inputs = {tensor.name: tensor for tensor in other.config.input}
    outputs = {tensor.name for tensor in other.config.output}
    for name in sorted(set(step.input_map) - set(inputs)):
        yield MAPPED.found(where, f"{other.name} has no input {name!r}")
    for name in sorted(set(step.output_map) - outputs):
        yield MAPPED.found(where, f"{other.name} has no output {name!r}")
    for name, tensor in inputs.items():
        if not tensor.optional and name not in step.input_map:
            yield MAPPED.found(where, f"input {name!r} of {other.name} is not connected")


def _circles(models: Mapping[str, Model]) -> Iterator[Finding]:
    """Each ensemble that can reach itself."""
    after = {
        name: {step.model_name for step in model.config.ensemble_scheduling.step}
        for name, model in models.items()
    }
    for name, model in models.items():
        seen: set[str] = set()
        waiting = list(after[name])
        while waiting:
            step = waiting.pop()
            if step not in seen:
                seen.add(step)
                waiting += after.get(step, ())
        if name in seen:
            yield CIRCLE.found(model.where(FIELD), f"{name} contains itself")
