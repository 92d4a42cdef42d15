"""Perplexity of one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.core.progress import Progress, Silent
from toolchain.evaluate.divergence import score_tokens
from toolchain.evaluate.windows import batches, count_batches, cut, fitting_batch_size

if TYPE_CHECKING:
    import torch

Logits = Callable[["torch.Tensor"], "torch.Tensor"]


def logits_of(source: Any) -> Logits:
    """``input_ids`` [B, T] -> logits [B, T, V], of a LocalEngine or a transformers model."""
    if hasattr(source, "forward_logits"):
        forward: Logits = source.forward_logits
        return forward

    def run(input_ids: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.no_grad():
            logits: torch.Tensor = source(input_ids=input_ids.to(source.device), use_cache=False).logits
            return logits

    return run


def model_of(source: Any) -> Any:
    """The transformers model of a LocalEngine, or the model itself."""
    return source.model if hasattr(source, "forward_logits") else source


def vocab_size_of(source: Any) -> int:
    return int(model_of(source).config.get_text_config().vocab_size)


def perplexity(
    source: Any,
    token_ids: Sequence[int],
    *,
    window: int = 512,
    stride: int | None = None,
    batch_size: int | None = None,
    bos: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float | int]:
    """``nll`` (mean, in nats), ``ppl`` = exp(nll) and ``tokens`` scored, of a LocalEngine or a transformers
    model.

    ``stride`` defaults to ``window``: windows do not overlap. ``bos`` is put before every window and never
    scored. ``batch_size`` None: as many windows as fit ``LOGITS_BYTES``.
    """
    windows = cut(len(token_ids), window=window, stride=stride or window, bos=bos is not None)
    size = batch_size or fitting_batch_size(window, vocab_size_of(source))
    forward = logits_of(source)
    total, tokens = 0.0, 0
    work = batches(token_ids, windows, bos=bos, batch_size=size)
    bar = progress or Silent()
    for batch in bar.track(work, description="perplexity", total=count_batches(windows, size)):
        logits = batch.predictions(forward(batch.input_ids))
        targets = batch.targets().to(logits.device)
        total += float(score_tokens(None, {"model": logits}, targets)["model/nll"].sum())
        tokens += len(targets)
    return {"nll": total / tokens, "ppl": math.exp(total / tokens), "tokens": tokens}
