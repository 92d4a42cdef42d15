"""2:4 sparsity before quantization: zeros that hardware skips, in exactly the matrices that the plan quantizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from toolchain.core.progress import Progress
from toolchain.families import Family
from toolchain.plan.types import Plan
from toolchain.quantize.forward import CalibrationPass
from toolchain.quantize.sparsity.apply import dense_groups, prune
from toolchain.quantize.sparsity.hold import ZeroHold, hold_zeros
from toolchain.quantize.sparsity.magnitude import pruned

BATCH_WEIGHTS = 1 << 28
"""Weights that ModelOpt gets at once: it keeps a mask, a byte for each, until it is done with all."""


def sparsify(
    model: nn.Module,
    plan: Plan,
    family: Family,
    forward: CalibrationPass | None,
    progress: Progress,
) -> dict[str, Any]:
    """Make every Linear of ``model`` that ``plan`` quantizes sparse, in place, before it gets quantizers.

    Experts are Linears of their own here (``modeling/experts.py``); ModelOpt alone passes over fused ones. ``forward``
    is needed for SparseGPT. Returns counts for the manifest, {} for a dense plan. ToolchainError TC-264 when ModelOpt
    did something else than asked.
    """
    from toolchain.quantize.quantizers import planned_modules

    if plan.sparsity is None:
        return {}
    paths = list(planned_modules(model, plan, family))
    unseen: list[str] = []
    rest = paths
    if plan.sparsity.method == "sparsegpt" and forward is not None:
        from toolchain.quantize.sparsity.sparsegpt import prune_layers

        unseen, rest = prune_layers(model, paths, forward, progress)
    for part in progress.track(list(_batches(model, rest)), description="2:4 sparsity"):
        prune(part, "magnitude")
    weights = [model.get_parameter(f"{path}.weight") for path in paths]
    facts = {
        "matrices": len(paths),
        "weights": sum(weight.numel() for weight in weights),
        "zeros": sum(int((weight == 0).sum()) for weight in weights),
        "by_magnitude": len(unseen) + len(rest),
    }
    if unseen:
        progress.note(
            f"{len(unseen)} of {len(paths)} matrices saw no token, e.g. {unseen[0]}: pruned by magnitude, not by "
            "SparseGPT"
        )
    return facts


def _batches(model: nn.Module, paths: list[str]) -> Iterator[dict[str, nn.Linear]]:
    part: dict[str, nn.Linear] = {}
    used = 0
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear), "planned_modules lists Linears"
        if part and used + linear.weight.numel() > BATCH_WEIGHTS:
            yield part
            part, used = {}, 0
        part[path] = linear
        used += linear.weight.numel()
    if part:
        yield part


__all__ = ["ZeroHold", "dense_groups", "hold_zeros", "prune", "pruned", "sparsify"]
