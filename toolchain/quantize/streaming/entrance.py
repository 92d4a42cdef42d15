"""In front of the first layer: embeddings, and the masks and positions that every layer is given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from toolchain.modeling.layered import LayeredModel
from toolchain.quantize.accuracy.layers import Arguments, enter
from toolchain.quantize.streaming.hidden import Layout, write


def enter_all(
    layered: LayeredModel, batches: list[torch.Tensor], arguments: Arguments, path: Path | None
) -> Layout:
    """Fill ``arguments``; write the inputs of the first layer for all ``batches`` [B, T] to ``path``, unless None."""
    with layered.ends(head=False) as model:

        def embedded() -> Iterator[torch.Tensor]:
            for batch in batches:
                yield enter(model, batch.to(layered.device), arguments)

        by_shape = {batch.shape: batch for batch in batches}
        samples = {
            shape: enter(model, batch.to(layered.device), arguments) for shape, batch in by_shape.items()
        }
        layout = Layout(
            shapes=tuple(tuple(samples[batch.shape].shape) for batch in batches),
            dtype=next(iter(samples.values())).dtype,
        )
        if path is not None:
            write(path, embedded())
    return layout
