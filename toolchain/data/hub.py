"""Samples of a data set on the hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator

from toolchain.core.errors import ToolchainError
from toolchain.data.texts import Sample, sample_of

SPLIT = "train"


def read_hub_texts(name: str) -> Iterator[Sample]:
    """Samples of ``name`` or ``name:config`` (split ``train``), without downloading it whole.

    ToolchainError TC-524 for an unknown name, no network, or offline mode.
    """
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    try:
        rows = iter(load_dataset(repository, config or None, split=SPLIT, streaming=True))
        first = next(rows, None)
    except Exception as error:
        raise ToolchainError(
            f"the data set {name!r} cannot be read from the hub: {type(error).__name__}: {error}",
            hint="check the name, the network and HF_HUB_OFFLINE, or give a local file",
            code="TC-524",
        ) from error
    if first is None:
        raise ToolchainError(f"the data set {name!r} has no rows in its split {SPLIT!r}", code="TC-524")
    yield sample_of(first, f"{name} row 0")
    for number, row in enumerate(rows, start=1):
        yield sample_of(row, f"{name} row {number}")
