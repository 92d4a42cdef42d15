"""ModelOpt's ``mts.sparsify`` and ``mts.export`` on exactly the matrices that are asked for.

ModelOpt walks the model that it is given and chooses by patterns, which leave out lm_head and know nothing of a plan.
So it is given a container of the very Linears that are meant: it swaps their class in place, and back at export.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from toolchain.core.errors import ToolchainError
from toolchain.quantize.sparsity.magnitude import without_negative_zeros

MODES = {"magnitude": "sparse_magnitude", "sparsegpt": "sparsegpt"}
LISTED = 3


def prune(
    linears: Mapping[str, nn.Linear], method: str, forward: Callable[[Any], None] | None = None
) -> None:
    """Make the weights of ``linears`` (module path -> Linear) 2:4 sparse, in place.

    ``forward``: runs data through them, for ``sparsegpt``. ToolchainError TC-264 when ModelOpt left one dense.
    """
    import modelopt.torch.sparsity as mts

    before = {path: linear.weight for path, linear in linears.items()}
    holder: nn.Module = nn.ModuleDict({str(index): item for index, item in enumerate(linears.values())})
    config = {"verbose": False, "forward_loop": forward, "device": str(_device(linears.values()))}
    with _quiet() as said:
        holder = mts.sparsify(holder, MODES[method], config if forward else {"verbose": False})
        mts.export(holder)
    for path, linear in linears.items():
        parameter = before[path]
        parameter.data = without_negative_zeros(linear.weight.data)
        linear.weight = parameter  # views of fused experts and whoever else holds it stay whole
        vars(linear).pop("is_sparse", None)  # left behind by the export
    _require_sparse(before, said)


def dense_groups(weight: torch.Tensor) -> int:
    """Groups of four along the last dimension, a multiple of 4, with more than two numbers that are not zero."""
    return int(((weight != 0).unflatten(-1, (-1, 4)).sum(-1) > 2).sum())


def _device(linears: Iterable[nn.Linear]) -> torch.device:
    return next(iter(linears)).weight.device


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """ModelOpt prints a line for every matrix, and says by a warning which it skips."""
    said: list[str] = []
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
        said += [str(item.message) for item in caught if "Skipping" in str(item.message)]


def _require_sparse(weights: Mapping[str, torch.Tensor], said: list[str]) -> None:
    """ToolchainError TC-264 for matrices that ModelOpt left as they were, or whose numbers it spoilt."""
    wrong = [
        path
        for path, weight in weights.items()
        if weight.shape[-1] % 4 or dense_groups(weight) or not weight.isfinite().all()
    ]
    if wrong:
        because = f" (ModelOpt: {said[0]})" if said else ""
        raise ToolchainError(
            f"{len(wrong)} of {len(weights)} matrices are not 2:4 sparse, or not finite, after ModelOpt made them so, "
            f"e.g. {', '.join(wrong[:LISTED])}{because}",
            hint="a NaN or infinity in the source or in its activations does that; else leave --sparsity out",
            code="TC-264",
        )
