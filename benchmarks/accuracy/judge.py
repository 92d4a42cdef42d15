"""Logits against the source's, window by window: the one measurement that every method gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.accuracy.data import BATCH, evaluation_hash, evaluation_tokens, reference_logits
from toolchain.evaluate.divergence import token_kl, token_nll

RESAMPLES = 2000
"""Of windows, for the confidence interval: tokens of one window are not independent, windows nearly are."""
ABSURD = 1.0
"""Nats: beyond any format here; a loader that filled holes with random numbers gets there."""
Logits = Callable[[torch.Tensor], torch.Tensor]


def judge(model: str, run: Logits) -> dict[str, Any]:
    """Figures of ``run`` (ids [B, T] -> logits [B, T, V]) on the held-out windows of ``model``, in nats.

    ``kl_windows`` has the mean KL of each window, for paired comparisons of two methods.
    """
    tokens = evaluation_tokens(model)
    parts = (run(part) for part in tokens.split(BATCH))
    return judge_logits(model, (row for part in parts for row in part))


def judge_file(model: str, path: Any) -> dict[str, Any]:
    """The same for logits [windows, T, V] that another environment wrote."""
    with safe_open(path, framework="pt") as file:
        logits = file.get_slice("logits")
        return judge_logits(model, (logits[index] for index in range(logits.get_shape()[0])))


@torch.no_grad()
def judge_logits(model: str, rows: Iterator[torch.Tensor]) -> dict[str, Any]:
    """``rows`` gives logits [T, V] of each window in order. Position t is judged on token t + 1."""
    tokens = evaluation_tokens(model)
    kl: list[torch.Tensor] = []
    nll = baseline = agreed = 0.0
    with safe_open(reference_logits(model), framework="pt") as file:
        references = file.get_slice("logits")
        for index, (ids, row) in enumerate(zip(tokens, rows, strict=True)):
            mine, theirs, targets = row[:-1].float(), references[index][:-1], ids[1:]
            if not bool(torch.isfinite(mine).all()):
                raise SystemExit(f"{model}: window {index} has logits that are not finite")
            kl.append(token_kl(mine, theirs))
            nll += float(token_nll(mine, targets).sum())
            baseline += float(token_nll(theirs, targets).sum())
            agreed += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
    every, windows = torch.cat(kl), torch.stack(kl).mean(dim=1)
    if float(every.mean()) > ABSURD:
        raise SystemExit(f"{model}: KL {float(every.mean()):.2f}: this is not the model that was quantized")
    low, high = interval(windows)
    return {
        "tokens": len(every),
        "token_hash": evaluation_hash(model),
        "kl_mean": float(every.mean()),
        "kl_low": low,
        "kl_high": high,
        "kl_median": float(every.median()),
        "kl_p99": float(every.quantile(0.99)),
        "ppl": math.exp(nll / len(every)),
        "baseline_ppl": math.exp(baseline / len(every)),
        "top1_agreement": agreed / len(every),
        "kl_windows": [round(value, 9) for value in windows.tolist()],
    }


def interval(windows: torch.Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of ``windows`` [n]; seeded."""
    return _bounds(_resampled(windows))


def ratio_interval(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """95 % interval of mean(mine) / mean(theirs) over the same windows, resampled together."""
    return _bounds(_resampled(mine) / _resampled(theirs))


def _resampled(windows: torch.Tensor) -> torch.Tensor:
    chosen = torch.randint(
        0, len(windows), (RESAMPLES, len(windows)), generator=torch.Generator().manual_seed(0)
    )
    return windows[chosen].mean(dim=1)


def _bounds(values: torch.Tensor) -> tuple[float, float]:
    low, high = values.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
