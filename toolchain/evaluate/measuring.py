"""One loop over the text: the baseline once, every variant of the quantized model once, and little is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress
from toolchain.evaluate.divergence import score_tokens
from toolchain.evaluate.inside import hidden_sums, loads, routing_sums, squared_error
from toolchain.evaluate.observing import observe
from toolchain.evaluate.perplexity import logits_of, model_of, vocab_size_of
from toolchain.evaluate.records import Batch, Records
from toolchain.evaluate.windows import Window, WindowBatch, batches, count_batches, fitting_batch_size

if TYPE_CHECKING:
    import torch

    from toolchain.evaluate.state import State


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the quantized model."""

    name: str
    activations: bool
    """Inputs of quantized Linears rounded as on the target."""
    kv_cache: bool
    """Keys and values rounded as the quantized cache stores them."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured on."""

    token_ids: Sequence[int]
    windows: Sequence[Window]
    bos: int | None
    batch_size: int

    def __len__(self) -> int:
        return count_batches(self.windows, self.batch_size)

    def batches(self) -> Iterator[WindowBatch]:
        return batches(self.token_ids, self.windows, bos=self.bos, batch_size=self.batch_size)


def fitting_rows(model: Any, window: int) -> int:
    """Windows per batch, so that logits and the hidden states of all layers stay within a bound."""
    config = model_of(model).config.get_text_config()
    hidden = config.num_hidden_layers * config.hidden_size * model_of(model).dtype.itemsize
    return fitting_batch_size(window, vocab_size_of(model), kept_bytes=hidden)


def measure(
    source: Any,
    baseline: Any | None,
    work: Work,
    *,
    variants: Sequence[Variant],
    state: State | None = None,
    progress: Progress,
) -> Records:
    """Run ``source`` (LocalEngine or transformers model) in each of ``variants``, and ``baseline`` if there is one.

    ``state`` gives the batches that an interrupted run finished and takes the others as they are made. Raises
    ToolchainError TC-527 for logits that are not finite.
    """
    records = Records(state.finished() if state else ())
    if len(records):
        progress.note(f"going on after {len(records)} of {len(work)} batches that were measured before")
    left = islice(work.batches(), len(records), None)
    for batch in progress.track(left, description="evaluate", total=len(work) - len(records)):
        found = _measure(source, baseline, batch, variants)
        if state:
            state.add(len(records), found)
        records.add(found)
    return records


def _measure(source: Any, baseline: Any | None, batch: WindowBatch, variants: Sequence[Variant]) -> Batch:
    from toolchain.modeling.emulation import emulating

    run, model, shape = logits_of(source), model_of(source), batch.input_ids.shape
    reference, logits, found = None, {}, {}
    if baseline is not None:
        with observe(model_of(baseline)) as before:
            reference = batch.predictions(logits_of(baseline)(batch.input_ids))
        found["baseline/load"] = loads(before, shape, batch.fresh)

    def error(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Compared at once: only one model's hidden states are held."""
        theirs = before.hidden[layer]
        return squared_error(hidden.to(theirs.device), theirs)

    def nothing(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[..., :0]

    for variant in variants:
        switched = emulating(model, activations=variant.activations, kv_cache=variant.kv_cache)
        with switched, observe(model, nothing if baseline is None else error) as inside:
            logits[variant.name] = batch.predictions(run(batch.input_ids))
        found[f"{variant.name}/load"] = loads(inside, shape, batch.fresh)
        if baseline is not None and inside.hidden:
            found[f"{variant.name}/hidden"] = hidden_sums(inside, batch.fresh)
        if baseline is not None:
            found[f"{variant.name}/routing"] = routing_sums(inside, before, shape, batch.fresh)
    device = next(iter(logits.values())).device
    if reference is not None:
        reference = reference.to(device)
    scores = score_tokens(reference, logits, batch.targets().to(device))
    _refuse_not_finite(scores)
    rows, length = shape
    counts = {"scored": length - batch.first, "fresh": length - batch.fresh}
    return _as_arrays({**found, **scores}, {name: [count] * rows for name, count in counts.items()})


def _as_arrays(tensors: dict[str, torch.Tensor | None], counts: dict[str, list[int]]) -> Batch:
    import numpy as np

    arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
    return {**arrays, **{name: np.array(values, dtype=np.int64) for name, values in counts.items()}}


def _refuse_not_finite(scores: dict[str, torch.Tensor]) -> None:
    bad = {name: int((~values.isfinite()).sum()) for name, values in scores.items()}
    if any(bad.values()):
        found = ", ".join(f"{count} of {len(scores[name])} {name}" for name, count in bad.items() if count)
        raise ToolchainError(
            f"the model computes NaN or infinity: {found}",
            hint="`toolchain verify` audits the scales of the checkpoint",
            code="TC-527",
        )
