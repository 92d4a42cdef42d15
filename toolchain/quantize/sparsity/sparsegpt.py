"""SparseGPT layer by layer: every layer is looked at on what the layers before it, already sparse, compute.

ModelOpt keeps the Hessian [in, in] of every matrix that it works on, for 128 experts of 48 layers hundreds of
gigabytes: so it gets the matrices of one layer at a time, and of a wide one only as many as ``GRAM_BUDGET_BYTES`` hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress
from toolchain.quantize.accuracy.layers import Arguments, HeldHidden, LayerWalk, enter
from toolchain.quantize.forward import CalibrationPass
from toolchain.quantize.sparsity.apply import prune
from toolchain.recipes import GRAM_BUDGET_BYTES


def prune_layers(
    model: nn.Module, paths: list[str], forward: CalibrationPass, progress: Progress
) -> tuple[list[str], list[str]]:
    """Make the Linears at ``paths`` sparse; (those whose input no token reached, those that are in no layer).

    The first are pruned by magnitude: with the identity for a Hessian SparseGPT is nothing else. The second are left
    alone.
    """
    arguments: Arguments = {}
    hidden = HeldHidden(enter(model, batch.to(forward.device), arguments) for batch in forward.batches)
    walk = LayerWalk(model, hidden, arguments)
    unseen: list[str] = []
    left = set(paths)
    for _ in progress.track(walk, description="SparseGPT, by layer", total=len(walk)):
        inside = [path for path in paths if path.startswith(f"{walk.path}.")]
        for part in _batches(model, inside):
            linears: dict[str, nn.Linear] = {path: model.get_submodule(path) for path in part}
            with forward.widening.active(f"{walk.path}."):
                prune(linears, "sparsegpt", partial(_collect, linears, walk, unseen))
        left -= set(inside)
    return unseen, [path for path in paths if path in left]


def _collect(linears: dict[str, Any], walk: LayerWalk, unseen: list[str], _: Any) -> None:
    """ModelOpt's hooks sum up the Hessians while the layer runs.

    ToolchainError TC-264 when one is not finite: ModelOpt would go on with a mask of NaN.
    """
    walk.run()
    for path, linear in linears.items():
        hessian: torch.Tensor = linear.hessian
        if not hessian.isfinite().all():
            raise ToolchainError(
                f"the inputs of {path} are not finite on the calibration data",
                hint="the model computes NaN or infinities: use --sparsity-method magnitude to look at weights only",
                code="TC-264",
            )
        if not hessian.diagonal().any():
            # A Hessian of zeros makes ModelOpt prune the whole matrix: every input would count as dead.
            hessian.fill_diagonal_(1.0)
            unseen.append(path)


def _batches(model: nn.Module, paths: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    used = 0
    for path in paths:
        linear: Any = model.get_submodule(path)
        size = 4 * linear.in_features**2
        if part and used + size > GRAM_BUDGET_BYTES:
            yield part
            part, used = [], 0
        part.append(path)
        used += size
    if part:
        yield part
