"""How far the student is from its teacher on text that is not trained on; the definitions are those of ``evaluate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from toolchain.evaluate.divergence import score_tokens
from toolchain.evaluate.inside import routing_sums
from toolchain.evaluate.observing import Observed, moe_layers, observe
from toolchain.evaluate.windows import fitting_batch_size
from toolchain.qat.losses import same_vocabulary

Total = Callable[[torch.Tensor], torch.Tensor]
"""A tensor of this device's sums -> the sums over all devices."""
NAMES = ("nll", "kl", "top1", "router")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A model as it is called (wrapped for several devices), and as it is looked into."""

    run: Any
    inner: Any

    def logits(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, Observed]:
        with observe(self.inner, lambda layer, hidden: hidden[..., :0]) as seen:
            return self.run(input_ids=input_ids).logits, seen


@torch.no_grad()
def measure_held_out(
    student: Judged,
    teacher: Judged | None,
    sequences: torch.Tensor,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    total: Total = lambda sums: sums,
) -> dict[str, float]:
    """Means over ``sequences`` [m, T]: ``ce`` (nats per token) and ``ppl``; against a teacher ``kl``
    (teacher || student), ``top1`` and, for mixtures of experts, ``router`` (share of choices in common).

    A collective where ``world`` > 1: every rank runs as many batches of the same size, each on sequences of its own.
    """
    vocabulary = student.inner.config.get_text_config().vocab_size
    size = fitting_batch_size(sequences.shape[1], vocabulary)
    sums = torch.zeros(len(NAMES), 2, dtype=torch.float64)
    for rows, weights in _shares(sequences, size, rank, world):
        sums += _batch(student, teacher, rows.to(device), weights)
    sums = total(sums.to(device)).cpu()
    means = {name: float(value / count) for name, (value, count) in zip(NAMES, sums, strict=True) if count}
    nll = means.pop("nll")
    return {"ce": nll, "ppl": math.exp(min(nll, 700.0)), **means}


def _shares(
    sequences: torch.Tensor, size: int, rank: int, world: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of this rank and the weight of each sequence: 0 where one only fills the batch."""
    each = math.ceil(len(sequences) / world)
    mine = torch.arange(each) * world + rank
    for at in range(0, each, size):
        rows = mine[at : at + size]
        yield sequences[rows.clamp(max=len(sequences) - 1)], (rows < len(sequences)).double()


def _batch(
    student: Judged, teacher: Judged | None, input_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[figures, 2] float64: sums over the tokens of the batch, and of how many."""
    sums = torch.zeros(len(NAMES), 2, dtype=torch.float64)
    logits, inside = student.logits(input_ids)
    reference, before = teacher.logits(input_ids) if teacher else (None, None)
    if reference is not None:
        logits, reference = same_vocabulary(logits, reference.to(logits.device))
        reference = reference[:, :-1].flatten(0, 1)
    scores = score_tokens(reference, {"student": logits[:, :-1].flatten(0, 1)}, input_ids[:, 1:].flatten())
    positions = input_ids.shape[1] - 1
    for index, name in enumerate(NAMES):
        values = scores.get(f"student/{name}")
        if values is not None:
            by_row = values.double().unflatten(0, (len(input_ids), positions)).sum(1)
            sums[index] += torch.stack([(by_row * weights).sum(), weights.sum() * positions])
    routed = routing_sums(inside, before, input_ids.shape, 0) if before and student_routes(student) else None
    if routed is not None:
        by_row = routed[:, :, 0].mean(1)
        sums[NAMES.index("router")] += torch.stack(
            [(by_row * weights).sum(), weights.sum() * input_ids.shape[1]]
        )
    return sums


def student_routes(student: Judged) -> bool:
    """Whether it has experts that are observed."""
    return bool(moe_layers(student.inner))
