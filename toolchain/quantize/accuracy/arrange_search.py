"""Which order and powers of two of an MLP's channels let neighbours round well: the search behind ``arrange.py``.

The error that is lowered is the squared one of down's output over a sample of tokens, errors of single channels taken
as independent: sum of error(x)**2 * |W column|**2 for rounded inputs, and sum of error(W)**2 * |x|**2 for rounded
weights. Channels of two blocks are exchanged, and single ones scaled, wherever that lowers it; all pairs of blocks of
several MLPs are tried at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from toolchain.codecs import e2m1

ROUNDS = 400
"""Moves of each kind per pair of blocks: on the demo 250 lose a sixth of the gain; on six of its experts 1,500
won nothing."""
ELEMENTS = 1 << 24
"""Inputs and weights of MLPs that are searched together: many small ones cost little more than one."""


@dataclass(frozen=True)
class Arrangement:
    order: torch.Tensor
    """[K] int64: new channel i is the old channel ``order[i]``."""
    powers: torch.Tensor
    """[K] float32 powers of two by the old channel: what its row of up is multiplied with."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Tensor scales under which down's input and weight are rounded; None: they are not, or not in blocks."""

    inputs: torch.Tensor | None
    weight: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """One MLP to be arranged."""

    path: str
    inputs: torch.Tensor
    """[n, K] float32, of down."""
    judging: torch.Tensor
    """[j, K] float32 other inputs: an arrangement that does not help them is not taken."""
    weight: torch.Tensor
    """[N, K] float32, of down."""
    rounding: Rounding
    lowest: torch.Tensor
    """[K] float32 exponents that channels may have."""
    highest: torch.Tensor

    def share_left(self, found: Arrangement) -> float:
        """Of the error on ``judging``."""
        before = output_error(self.judging, self.weight, self.rounding)
        after = output_error(*rearranged(self.judging, self.weight, found), self.rounding)
        return float(after / before) if before > 0 else 1.0


def batches(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """MLPs of one shape that are rounded alike, at most ``ELEMENTS`` numbers in each if it is not one alone."""
    batch: list[Task] = []
    for task in tasks:
        kind = (task.weight.shape, task.rounding.inputs is None)
        other = bool(batch) and kind != (batch[0].weight.shape, batch[0].rounding.inputs is None)
        if batch and (other or sum(map(_elements, (*batch, task))) > ELEMENTS):
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


def _elements(task: Task) -> int:
    return task.inputs.numel() + task.weight.numel()


def search(tasks: list[Task], seed: int) -> list[Arrangement]:
    """The arrangement of each after ``ROUNDS`` rounds. All of one shape, rounded alike."""
    state = _State(tasks)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(ROUNDS):
        state.exchange(generator)
        state.scale(generator)
    return state.found()


def output_error(inputs: torch.Tensor, weight: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Squared error of the output, summed: inputs [n, K], weight [N, K]."""
    block = e2m1.BLOCK
    parts = (inputs.unflatten(-1, (-1, block)), weight.unflatten(-1, (-1, block)))
    sizes = [part.square().sum(0) for part in parts]
    return _errors(parts[0], parts[1], sizes[0], sizes[1], rounding.inputs, rounding.weight).sum()


def rearranged(
    inputs: torch.Tensor, weight: torch.Tensor, found: Arrangement
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [n, K] and weight [N, K] of down in the new order and scale: their product is what it was."""
    return (inputs * found.powers)[:, found.order], (weight / found.powers)[:, found.order]


def _errors(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    input_squares: torch.Tensor,
    weight_squares: torch.Tensor,
    input_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
) -> torch.Tensor:
    """[m] of blocks: inputs [n, m, 16], weight [N, m, 16], their squares summed over n and over N [m, 16], and tensor
    scales of one number or [m]."""
    total = torch.zeros(weight.shape[1], device=weight.device)
    if weight_scale is not None:
        total += (_squared(weight, weight_scale) * input_squares).sum(-1)
    if input_scale is not None:
        total += (_squared(inputs, input_scale) * weight_squares).sum(-1)
    return total


def _squared(blocks: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """[n, m, 16] -> [m, 16] squared errors of rounding, summed over n."""
    rounded = e2m1.fake_quantize(blocks.flatten(-2), scale_2).unflatten(-1, (-1, e2m1.BLOCK))
    return (rounded - blocks).square().sum(0)


class _State:
    """Everything by the blocks of all MLPs, m of each of E: [n, E m, 16] inputs, [N, E m, 16] weight, and [E m, 16] of
    channels. MLPs with fewer tokens have zeros for the rest."""

    def __init__(self, tasks: list[Task]) -> None:
        count, first = tasks[0].weight.shape[1], tasks[0].rounding
        self.mlps, self.blocks = len(tasks), count // e2m1.BLOCK
        rows = max(len(task.inputs) for task in tasks)

        def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(tensors, -2).unflatten(-1, (-1, e2m1.BLOCK)).flatten(-3, -2).contiguous()

        def padded(inputs: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(inputs, (0, 0, 0, rows - len(inputs)))

        # Rounded inputs do not count where they are not rounded: no need to carry them.
        self.inputs = joined(
            [padded(task.inputs)[: None if first.inputs is not None else 0] for task in tasks]
        )
        self.weight = joined([task.weight for task in tasks])
        self.input_squares = joined([task.inputs.square().sum(0) for task in tasks])
        self.weight_squares = joined([task.weight.square().sum(0) for task in tasks])
        self.lowest, self.highest = joined([t.lowest for t in tasks]), joined([t.highest for t in tasks])
        self.channels = joined([torch.arange(count, device=task.weight.device) for task in tasks])
        self.exponents = torch.zeros_like(self.weight_squares)
        self.scales = [
            None if any(item is None for item in part) else torch.stack(part).repeat_interleave(self.blocks)
            for part in ([t.rounding.inputs for t in tasks], [t.rounding.weight for t in tasks])
        ]
        self.errors = self._errors(self._all(), slice(None))

    def found(self) -> list[Arrangement]:
        channels, exponents = (
            item.unflatten(0, (self.mlps, -1)).flatten(1) for item in (self.channels, self.exponents)
        )
        powers = torch.empty_like(exponents).scatter_(1, channels, exponents.exp2())
        return [Arrangement(order=order, powers=own) for order, own in zip(channels, powers, strict=True)]

    def exchange(self, generator: torch.Generator) -> None:
        """Pair the blocks of each MLP at random; each pair exchanges one random channel for another if that helps."""
        device, half = self.channels.device, self.blocks // 2
        if not half:
            return  # one block has nobody to exchange with
        order = torch.rand(self.mlps, self.blocks, generator=generator).argsort(1)
        order += torch.arange(self.mlps).unsqueeze(-1) * self.blocks
        first, second = order[:, :half].flatten().to(device), order[:, half : 2 * half].flatten().to(device)
        at, other = torch.randint(e2m1.BLOCK, (2, len(first)), generator=generator).to(device)
        pair = torch.arange(len(first), device=device)
        sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for tensor in self._all():
            mine, theirs = tensor[..., first, :], tensor[..., second, :]
            leaving = mine[..., pair, at].clone()
            mine[..., pair, at] = theirs[..., pair, other]
            theirs[..., pair, other] = leaving
            sides[0].append(mine)
            sides[1].append(theirs)
        errors = [self._errors(side, where) for side, where in zip(sides, (first, second), strict=True)]
        better = errors[0] + errors[1] < self.errors[first] + self.errors[second]
        for where, side, error in zip((first, second), sides, errors, strict=True):
            self._take(better, where, side, error)

    def scale(self, generator: torch.Generator) -> None:
        """Double or halve one random channel of each block if that helps."""
        device, count = self.channels.device, len(self.channels)
        at = torch.randint(e2m1.BLOCK, (count,), generator=generator).to(device)
        step = (torch.randint(2, (count,), generator=generator) * 2.0 - 1.0).to(device)
        block = torch.arange(count, device=device)
        tried = [tensor.clone() for tensor in self._all()]
        inputs, weight, input_squares, weight_squares, exponents = tried[:5]
        inputs[..., block, at] *= step.exp2()
        weight[..., block, at] /= step.exp2()
        input_squares[block, at] *= (2 * step).exp2()
        weight_squares[block, at] /= (2 * step).exp2()
        exponents[block, at] += step
        errors = self._errors(tried, slice(None))
        asked = exponents[block, at]
        allowed = (asked >= self.lowest[block, at]) & (asked <= self.highest[block, at])
        self._take((errors < self.errors) & allowed, block, tried, errors)

    def _all(self) -> list[torch.Tensor]:
        rounded = [self.inputs, self.weight, self.input_squares, self.weight_squares]
        return [*rounded, self.exponents, self.channels, self.lowest, self.highest]

    def _errors(self, tensors: list[torch.Tensor], where: Any) -> torch.Tensor:
        """Of the blocks ``where``, whose ``_all()`` are ``tensors``."""
        inputs, weight, input_squares, weight_squares = tensors[:4]
        rounding = [None if scale is None else scale[where] for scale in self.scales]
        return _errors(inputs, weight, input_squares, weight_squares, rounding[0], rounding[1])

    def _take(
        self, better: torch.Tensor, where: torch.Tensor, tensors: list[torch.Tensor], errors: torch.Tensor
    ) -> None:
        chosen = where[better]
        for mine, new in zip(self._all(), tensors, strict=True):
            mine[..., chosen, :] = new[..., better, :]
        self.errors[chosen] = errors[better]
