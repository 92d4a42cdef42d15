"""Instance groups, the devices that they name, and the rate limiter's resources."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from toolchain.core.findings import Finding
from toolchain.triton.rules.backends import backend_of
from toolchain.triton.rules.model import PLACEHOLDER, Model
from toolchain.triton.rules.rule import Rule

COUNT = Rule(
    code="TC-602",
    says="an instance_group with a negative count",
    server="loads it with one instance",
    hint="expected >= 1",
)
DEVICES = Rule(
    code="TC-608",
    says="gpus with KIND_CPU or KIND_MODEL, a GPU twice, or a negative number",
    server="refuses (of a GPU twice: makes two sets of instances there)",
    hint="KIND_GPU takes gpus; KIND_CPU and KIND_MODEL take none",
)
PROFILE = Rule(
    code="TC-608", says="a profile outside of TensorRT, or one that is no number", server="refuses"
)
PASSIVE = Rule(
    code="TC-608",
    severity="warning",
    says="only passive instances",
    server="loads it; no request is ever answered",
    hint="leave one group without `passive`",
)
RATE = Rule(
    code="TC-608",
    severity="warning",
    says="a rate limiter's resource that is both global and of a device",
    server="refuses with --rate-limit=execution_count",
    hint="use two names",
)
GPU_LISTS = Rule(
    code="TC-608",
    says="gpu_device_ids of the llmapi layout that does not fit the instances or the ranks of a model",
    server="loads none of its instances, or two of them on one GPU",
    hint='expected the form "0,1;2,3": a list for each instance, a GPU for each rank',
)
RULES = (COUNT, DEVICES, PROFILE, PASSIVE, RATE, GPU_LISTS)


def lint_instances(model: Model) -> Iterator[Finding]:
    groups = model.config.instance_group
    for index, group in enumerate(groups):
        yield from _group(model, group, index)
    if groups and all(group.passive for group in groups):
        yield PASSIVE.found(model.where("instance_group"), "every instance_group is passive")
    kinds: dict[str, set[bool]] = {}
    for group in groups:
        for resource in group.rate_limiter.resources:
            kinds.setdefault(resource.name, set()).add(getattr(resource, "global"))
    for name in sorted(name for name, found in kinds.items() if len(found) > 1):
        yield RATE.found(model.where("instance_group"), f"resource {name!r} is global and of a device")


def _group(model: Model, group: Any, index: int) -> Iterator[Finding]:
    kind = group.Kind.Name(group.kind)
    if group.count < 0:
        where = model.where("instance_group", index, "count")
        yield COUNT.found(where, f"instance_group count {group.count}, expected >= 1")
    where = model.where("instance_group", index, "gpus")
    if group.gpus and kind in ("KIND_CPU", "KIND_MODEL"):
        yield DEVICES.found(where, f"{kind} with gpus {list(group.gpus)}")
    elif any(gpu < 0 for gpu in group.gpus):
        yield DEVICES.found(where, f"gpus {list(group.gpus)}, expected numbers >= 0")
    elif len(set(group.gpus)) != len(group.gpus):
        yield DEVICES.found(where, f"gpus {list(group.gpus)} names one twice")
    where = model.where("instance_group", index, "profile")
    if group.profile and backend_of(model) != "tensorrt":
        yield PROFILE.found(where, "profile is for TensorRT plans")
    elif any(not re.fullmatch(r"\d+", item) for item in group.profile):
        yield PROFILE.found(where, f"profile {list(group.profile)}, expected numbers >= 0")


def lint_gpu_lists(model: Model, *, is_llmapi: bool, ranks: int) -> Iterator[Finding]:
    """The parameter ``gpu_device_ids`` against the instances. ``ranks``: GPUs of one instance; 0 where unknown."""
    lists = model.parameter("gpu_device_ids")
    instances = sum(max(group.count, 1) for group in model.config.instance_group) or 1
    where = model.at_entry("parameters", "gpu_device_ids")
    if not lists:
        if is_llmapi and instances > 1:
            where = model.where("instance_group")
            yield GPU_LISTS.found(where, f"{instances} instances without the parameter gpu_device_ids")
        return
    if PLACEHOLDER.search(lists):
        return  # has been said
    groups = [part.strip() for part in lists.split(";")]
    ids = [item for part in groups for item in part.replace(" ", "").split(",")]
    if any(not re.fullmatch(r"\d+(\s*,\s*\d+)*", part) for part in groups):
        yield GPU_LISTS.found(where, f"gpu_device_ids {lists!r}")
    elif len(groups) != instances:
        yield GPU_LISTS.found(
            where, f"{instances} instances but gpu_device_ids {lists!r} lists {len(groups)}"
        )
    elif len(ids) != len(set(ids)):
        yield GPU_LISTS.found(where, f"gpu_device_ids {lists!r} names a GPU twice")
    elif ranks and any(part.count(",") + 1 != ranks for part in groups):
        yield GPU_LISTS.found(where, f"gpu_device_ids {lists!r}, and each instance has {ranks} ranks")
