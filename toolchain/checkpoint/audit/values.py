"""Rules on the numbers: scales finite and positive, equal where runtimes fuse, no NaN codes, routers untouched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from toolchain.checkpoint.audit.subject import KV_SUFFIXES, Subject
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.findings import Finding
from toolchain.core.progress import Progress

if TYPE_CHECKING:
    import torch


def scales(subject: Subject, progress: Progress) -> Iterator[Finding]:
    """Every scale is finite and greater than zero; FP8 weights hold no NaN code."""
    modules = list(subject.modules.items())
    for module, tensors in progress.track(modules, description="verify values", total=len(modules)):
        found = subject.format_of(module) if module in subject.quantized else None
        items = [item for item in found.stored if item.scale] if found else []
        wanted = {name for item in items for name in (item.suffix, *item.aliases)}
        for suffix in sorted((wanted | set(KV_SUFFIXES)) & set(tensors)):
            yield from _scale(f"{module}.{suffix}", subject.reader.get(tensors[suffix].name))
        if found and tensors.get("weight") and tensors["weight"].dtype == "F8_E4M3":
            yield from _nan_codes(f"{module}.weight", subject.reader.get(tensors["weight"].name))


def _scale(where: str, tensor: torch.Tensor) -> Iterator[Finding]:
    import torch

    if tensor.dtype == torch.uint8:  # E8M0: powers of two, with one code for NaN
        tensor = torch.where(tensor == 255, float("nan"), 1.0)
    values = tensor.float()
    bad = int((~values.isfinite()).sum())
    if bad:
        yield Finding(code="TC-314", where=where, message=f"{bad} of {values.numel()} values are not finite")
    low = int((values <= 0).sum())
    if low:
        yield Finding(
            code="TC-314", where=where, message=f"{low} of {values.numel()} values are zero or negative"
        )


def _nan_codes(where: str, tensor: torch.Tensor) -> Iterator[Finding]:
    import torch

    count = int(((tensor.view(torch.uint8) & 0x7F) == 0x7F).sum())
    if count:
        yield Finding(code="TC-314", where=where, message=f"{count} of {tensor.numel()} weights are NaN")


def fused_scales(subject: Subject) -> Iterator[Finding]:
    """q/k/v of one attention and gate/up of one expert share the scales that runtimes fuse."""
    import torch

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
                if not all(name in subject.reader.infos for name in names):
                    continue
                ours, theirs = (subject.reader.get(name) for name in names)
                if not torch.equal(ours, theirs):
                    yield _unequal(names, ours, theirs, requantized=found.requantized_in_fused)


def _unequal(
    names: tuple[str, str], ours: torch.Tensor, theirs: torch.Tensor, *, requantized: bool
) -> Finding:
    values = f"{float(theirs.float().max()):.6g} differs from {float(ours.float().max()):.6g} of {names[0]}"
    if requantized:
        hint = (
            "runtimes fuse both into one matmul, take the larger and requantize the other: a second rounding"
        )
        return Finding(code="TC-325", where=names[1], message=values, hint=hint, severity="warning")
    hint = "runtimes fuse both into one matmul and keep only one of the scales"
    return Finding(code="TC-325", where=names[1], message=values, hint=hint)


def against_source(subject: Subject, source: CheckpointReader, progress: Progress) -> Iterator[Finding]:
    """Everything that is not quantized is bit-equal to the source, routers above all; nothing is missing."""
    import torch

    folded = any(item.has_pre_quant_scale for item in subject.formats)
    names = list(source.infos)
    for name in progress.track(names, description="compare with source", total=len(names)):
        module, suffix = subject.family.split(name)
        if module in subject.quantized and suffix == "weight":
            continue
        role = subject.part(name).role.value
        if name not in subject.reader.infos:
            yield Finding(code="TC-326", where=name, message="is in the source, but not in the checkpoint")
        elif not torch.equal(_bits(subject.reader.get(name)), _bits(source.get(name))):
            if folded and role == "norm":
                message = "norm differs from the source (a channel scale was folded into it)"
                yield Finding(code="TC-327", where=name, message=message, severity="warning")
            else:
                yield Finding(code="TC-327", where=name, message=f"{role} differs from the source")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().flatten().view(torch.uint8)
