"""Which target, format and GPU gain from 2:4 sparsity; everything else refuses it.

A gain means kernels that skip zeros, and that are chosen. Nothing is ever smaller on disk or in memory: all targets
store every zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from toolchain.core.findings import Finding
from toolchain.core.gpus import GPUS, Gpu
from toolchain.formats import FORMATS
from toolchain.formats.base import Format
from toolchain.targets.base import PartKind, Target
from toolchain.targets.rows import Model, Row
from toolchain.targets.version import parse_version

CODE = "TC-263"
FIRST_SM = 80
"""Ampere: NVIDIA A100 architecture whitepaper, sparse tensor cores."""


def check_sparsity(
    target: Target, version: str, gpu: Gpu, parts: Iterable[tuple[Format, PartKind]]
) -> Iterator[Finding]:
    """An error when no part gains; warnings for parts that become sparse for nothing, and for gains nobody measured."""
    rows = {(found, kind): _row(target, version, gpu, found, kind) for found, kind in parts}
    gains = [key for key, row in rows.items() if row is not None and row.state != "no"]
    where = "--sparsity 2:4"
    if not gains:
        said = "; ".join(dict.fromkeys(_said(target, gpu, *key, row) for key, row in rows.items()))
        yield Finding(
            code=CODE,
            where=where,
            message=f"nothing gains from it with {target.name} {version} on {gpu.name}: {said}",
            hint=f"it would cost accuracy only. These gain: {'; '.join(gaining())}",
        )
        return
    for key in (key for key in rows if key not in gains):
        yield Finding(
            code=CODE,
            where=where,
            message=f"{_named(*key)} become sparse and gain nothing: {_reason(target, gpu, *key, rows[key])}",
            hint="only the other parts run faster",
            severity="warning",
        )
    for key in gains:
        row = rows[key]
        if row is not None and row.note:
            yield Finding(code=CODE, where=where, message=f"{_named(*key)}: {row.note}", severity="warning")


def gaining() -> list[str]:
    """What gains, in words: target, format, GPUs; experts nowhere."""
    from toolchain.targets import TARGETS

    found = []
    for target in TARGETS:
        for format in FORMATS:
            gpus: dict[str, list[str]] = {"yes": [], "limited": []}
            for gpu in GPUS:
                row = _row(target, target.default_version, gpu, format, "dense")
                if row is not None and row.state != "no":
                    gpus[row.state].append(gpu.name)
            said = [", ".join(gpus["yes"])] if gpus["yes"] else []
            said += [f"unverified {', '.join(gpus['limited'])}"] if gpus["limited"] else []
            if said:
                where = f"--target {target.name} --format {format.name}"
                found.append(f"{where} outside experts on {'; '.join(said)}")
    return found


def _row(target: Target, version: str, gpu: Gpu, format: Format, kind: PartKind) -> Row | None:
    model: Model = "moe" if kind == "moe" else "dense"
    rows = (
        row
        for row in target.sparse_rows
        if row.covers(format_name=format.name, sm=gpu.sm, model=model, version=str(parse_version(version)))
    )
    return next(rows, None)


def _named(format: Format, kind: PartKind) -> str:
    return {"moe": "experts", "lm_head": "lm_head", "dense": "dense and attention matrices"}[
        kind
    ] + f" in {format.name}"


def _said(target: Target, gpu: Gpu, format: Format, kind: PartKind, row: Row | None) -> str:
    """The reason with the part that it is about; of a target without any gain there is one reason for all."""
    reason = _reason(target, gpu, format, kind, row)
    return reason if row is None else f"{_named(format, kind)}: {reason}"


def _reason(target: Target, gpu: Gpu, format: Format, kind: PartKind, row: Row | None) -> str:
    if row is not None:
        return f"{row.note} ({row.source})"
    if not target.sparse_rows:
        return target.dense_because
    if gpu.sm and gpu.sm < FIRST_SM:
        return f"{gpu.name} (SM{gpu.sm}) has no sparse tensor cores, which begin with SM{FIRST_SM}"
    return f"no kernel that skips zeros is known for {_named(format, kind)} on {gpu.name}"
