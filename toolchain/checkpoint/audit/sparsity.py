"""Rules on zeros: a checkpoint that says it is 2:4 sparse has no group of four with more than two numbers that are not
zero.

Counted on the codes as they are stored, along the input dimension of the matrix that they stand for. TensorRT looks at
the same before it takes a kernel that skips zeros (developer guide, "structured sparsity"): one group makes the matrix
a dense one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.checkpoint.audit.subject import Subject, read_plan_beside
from toolchain.core.errors import ToolchainError
from toolchain.core.files import read_json
from toolchain.core.findings import Finding
from toolchain.core.progress import Progress
from toolchain.formats import Format
from toolchain.plan.steps import Sparsity

if TYPE_CHECKING:
    import torch

GROUP, KEPT = 4, 2
PIECE = 16 << 20
"""Numbers that are looked at at once."""
LISTED = 3


@dataclass(kw_only=True)
class _Counts:
    matrices: int = 0
    groups: int = 0
    dense: int = 0
    """Groups with more than two numbers that are not zero."""


def claimed(subject: Subject) -> Sparsity | None:
    """What the plan beside the checkpoint, or its quantize.json, says of its zeros; None for a dense one."""
    plan = read_plan_beside(subject.directory)
    if plan is not None and plan.sparsity is not None:
        return plan.sparsity
    path = subject.directory / "quantize.json"
    try:
        found = read_json(path).get("sparsity") if path.is_file() else None
        return Sparsity(pattern=str(found["pattern"]), method=str(found["method"])) if found else None
    except (ToolchainError, AttributeError, KeyError, TypeError):
        return None  # not ours: it promises nothing


def groups(subject: Subject, progress: Progress) -> tuple[list[Finding], dict[str, Any]]:
    """(findings, counts for the facts) of a checkpoint that says it is sparse; nothing of any other."""
    said = claimed(subject)
    if said is None:
        return [], {}
    total, worst = _Counts(), list[tuple[float, str, _Counts]]()
    # Weights of another shape are findings of their own.
    modules = [module for module in subject.quantized if subject.weight_shape(module)]
    for module in progress.track(modules, description="count zeros", total=len(modules)):
        format = subject.format_of(module)
        if format is None:
            continue
        for name, codes in _matrices(subject, module):
            own = _count(format, codes)
            total.matrices += 1
            total.groups += own.groups
            total.dense += own.dense
            if own.dense:
                worst.append((own.dense / own.groups, name, own))
    facts = {
        "pattern": said.pattern,
        "matrices": total.matrices,
        "groups": total.groups,
        "sparse_groups": total.groups - total.dense,
        "share": (total.groups - total.dense) / total.groups if total.groups else None,
    }
    return [_finding(said, total, worst)] if total.dense else [], {"sparsity": facts}


def _finding(said: Sparsity, total: _Counts, worst: list[tuple[float, str, _Counts]]) -> Finding:
    worst.sort(key=lambda item: (-item[0], item[1]))
    named = "; ".join(f"{name}: {own.dense} of {own.groups}" for _, name, own in worst[:LISTED])
    return Finding(
        code="TC-262",
        where=worst[0][1],
        message=f"{total.dense} of {total.groups} groups in {len(worst)} of {total.matrices} matrices are not "
        f"{said.pattern} sparse, as the plan says: {named}",
        hint="GPUs take such a matrix as a dense one: quantize again",
    )


def _matrices(subject: Subject, module: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, codes as a Linear of its own would store them) of each matrix in ``module``."""
    info = subject.modules[module].get("weight")
    if info is None:
        return
    codes = subject.reader.get(info.name)
    if not subject.family.is_fused(module):
        yield module, codes
        return
    from toolchain.codecs.fused import split_experts

    for name, own in split_experts(subject.family, module, {"weight": codes}):
        yield name, own["weight"]


def _count(format: Format, codes: torch.Tensor) -> _Counts:
    import torch

    counts = _Counts(matrices=1)
    step = max(1, PIECE // max(1, codes.shape[-1]))
    for start in range(0, len(codes), step):
        kept = nonzero(format, codes[start : start + step])
        short = -kept.shape[-1] % GROUP
        if short:
            kept = torch.nn.functional.pad(kept, (0, short))
        # Four bools are one integer; the product adds them up in its highest byte.
        quads = kept.contiguous().view(torch.int32)
        counts.groups += quads.numel()
        counts.dense += int(((quads * 0x01010101) >> 24 > KEPT).sum())
    return counts


def nonzero(format: Format, codes: torch.Tensor) -> torch.Tensor:
    """bool [out, in] of stored weights: which numbers are not zero. -0 is zero, in E4M3 and in E2M1."""
    import torch

    stored = next(item for item in format.stored if item.suffix == "weight")
    rows, columns = stored.shape(1 << 10, 1 << 10)
    codes = codes.view(torch.uint8)
    if columns < 1 << 10:  # two E2M1 numbers of neighbouring inputs in a byte
        return torch.stack(((codes & 0x07) != 0, (codes & 0x70) != 0), dim=-1).flatten(-2)
    if rows < 1 << 10:  # two INT4 numbers of neighbouring outputs
        return torch.stack(((codes & 0x0F) != 0, (codes & 0xF0) != 0), dim=1).flatten(0, 1)
    return (codes & 0x7F if stored.dtype == "F8_E4M3" else codes) != 0


def pruned_source(said: Sparsity, format: Format, codes: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``source`` [out, in] with zeros where the checkpoint may have them, to compare it with.

    By magnitude that is where two others of the four are at least as large; of other methods only the inputs know, so
    every stored zero counts.
    """
    import torch

    zero = ~nonzero(format, codes)
    if said.method == "magnitude" and source.shape[-1] % GROUP == 0:
        size = source.abs().unflatten(-1, (-1, GROUP))
        larger = (size.unsqueeze(-2) >= size.unsqueeze(-1)).sum(-1) - 1  # itself not counted
        zero &= (larger >= KEPT).flatten(-2)
    return torch.where(zero, torch.zeros((), dtype=source.dtype), source)
