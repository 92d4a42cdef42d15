"""Rules on the numbers: scales finite and positive, equal where runtimes fuse, no NaN anywhere, nothing empty."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from statistics import median

from toolchain.checkpoint.audit.scan import Scan, Seen, Task
from toolchain.checkpoint.audit.subject import Subject
from toolchain.checkpoint.compressed import RECIPROCAL
from toolchain.checkpoint.raw import places
from toolchain.core.findings import Finding
from toolchain.core.roles import Role
from toolchain.targets.checkpoint_rules import OUTLIER_EXPERT

Values = Mapping[str, Seen]


def start(subject: Subject, *, threads: int | None = None) -> Scan:
    """Begin to read every byte, in threads; ``Scan.result`` gives tensor name -> what was seen."""
    where = places(subject.directory, subject.reader.stored.values())
    tasks = []
    for module, tensors in subject.modules.items():
        scales = subject.scale_suffixes(module)
        for suffix, info in tensors.items():
            origin = subject.reader.origin(info.name)
            if origin:
                dtype = subject.reader.stored[origin].dtype
                tasks.append(Task(name=info.name, place=where[origin], dtype=dtype, scale=suffix in scales))
    return Scan(subject.directory, tasks, threads=threads)


def numbers(subject: Subject, seen: Values) -> Iterator[Finding]:
    """Every scale is finite and greater than zero; no weight is NaN or infinite; no quantized weight is all zeros."""
    for module, tensors in subject.modules.items():
        for suffix in sorted(tensors):
            found, where = seen.get(tensors[suffix].name), f"{module}.{suffix}"
            if found is None:
                continue
            if found.not_finite:
                message = f"{found.not_finite} of {found.elements} values are not finite"
                yield Finding(code="TC-314", where=where, message=message)
            if found.low:
                message = f"{found.low} of {found.elements} values are zero or negative"
                yield Finding(code="TC-314", where=where, message=message)
            if suffix == "weight" and found.zero and module in subject.quantized:
                yield Finding(
                    code="TC-336",
                    where=where,
                    message="every weight is zero",
                    hint="a file that was not written to its end looks like this; a pruned expert, too",
                    severity="warning",
                )


def fused_scales(subject: Subject, seen: Values) -> Iterator[Finding]:
    """q/k/v of one attention and gate/up of one expert share the scales that runtimes fuse."""
    for module in subject.quantized:
        found = subject.format_of(module)
        parent, _, projection = module.rpartition(".")
        group = subject.family.fused_siblings(projection)
        if found is None or projection != group[0]:
            continue
        siblings = [f"{parent}.{name}" for name in group[1:] if f"{parent}.{name}" in subject.modules]
        for sibling in siblings:
            if subject.quantized.get(sibling) != subject.quantized[module]:
                yield Finding(
                    code="TC-325",
                    where=sibling,
                    message=f"is stored as {subject.quantized.get(sibling)}, its fused sibling {projection} as "
                    f"{subject.quantized[module]}",
                )
                continue
            for suffix in found.equal_in_fused:
                names = (f"{module}.{suffix}", f"{sibling}.{suffix}")
                ours, theirs = (number(subject, seen, name) for name in names)
                # Not equal to itself either: a NaN is another finding, and no reason to be silent here.
                if ours is not None and theirs is not None and ours != theirs:
                    yield _unequal(names, ours, theirs, requantized=found.requantized_in_fused)


def number(subject: Subject, seen: Values, name: str) -> float | None:
    """The value of a scalar by its name; None when it is missing, larger, or no floating number."""
    found, info = seen.get(name), subject.reader.infos.get(name)
    if found is None or info is None:
        return None
    origin = subject.reader.origin(name)
    value = _decoded(found.small, subject.reader.stored[origin].dtype)
    if value and origin.endswith(RECIPROCAL):
        return 1 / value
    return value


def _decoded(data: bytes, dtype: str) -> float | None:
    """One little-endian floating number; None for anything else."""
    if dtype == "F32" and len(data) == 4:
        return float(struct.unpack("<f", data)[0])
    if dtype == "BF16" and len(data) == 2:
        return float(struct.unpack("<f", bytes(2) + data)[0])
    if dtype == "F16" and len(data) == 2:
        return float(struct.unpack("<e", data)[0])
    return None


def _unequal(names: tuple[str, str], ours: float, theirs: float, *, requantized: bool) -> Finding:
    values = f"{theirs:.6g} differs from {ours:.6g} of {names[0]}"
    if requantized:
        hint = (
            "runtimes fuse both into one matmul, take the larger and requantize the other: a second rounding"
        )
        return Finding(code="TC-325", where=names[1], message=values, hint=hint, severity="warning")
    hint = "runtimes fuse both into one matmul and keep only one of the scales"
    return Finding(code="TC-325", where=names[1], message=values, hint=hint)


def outlier_experts(subject: Subject, seen: Values) -> Iterator[Finding]:
    """Runtimes give all experts of a layer the largest input_scale: one outlier takes precision from the rest."""
    layers: dict[tuple[str, str], dict[str, float]] = {}
    for module in subject.quantized:
        part = subject.part(module)
        value = number(subject, seen, f"{module}.input_scale")
        if part.role is Role.ROUTED_EXPERT and part.expert is not None and value is not None:
            parent = module.partition(".experts.")[0]
            layers.setdefault((parent, part.projection), {})[module] = value
    for (parent, projection), values in layers.items():
        largest = max(values, key=lambda name: values[name])
        usual = median(values.values())
        if usual > 0 and values[largest] > OUTLIER_EXPERT * usual:
            yield Finding(
                code="TC-337",
                where=f"{largest}.input_scale",
                message=f"{values[largest]:.3g} is {values[largest] / usual:.0f} times the median {usual:.3g} of "
                f"{projection} in {parent}",
                hint="runtimes use the largest for all experts of the layer: calibrate with more or other text",
                severity="warning",
            )
