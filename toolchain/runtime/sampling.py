"""The next token of each row: greedy, or sampled so that a row's result does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from toolchain.runtime.types import SamplingParams


class Sampler:
    """The random numbers of one request: one uniform number per token, drawn on the CPU.

    The device never draws: the same seed gives the same numbers on CPU and GPU and in any batch.
    """

    def __init__(self, params: SamplingParams) -> None:
        import torch

        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def uniform(self) -> float:
        import torch

        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Token ids for the rows of ``logits`` [B, V] (any float dtype), row i by ``samplers[i]``.

    Ties of a greedy row go to the lowest id, as in ``transformers``.
    """
    logits = logits.float()
    chosen = logits.argmax(dim=-1)
    sampled = [index for index, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    plain = [index for index in sampled if _unfiltered(samplers[index].params)]
    filtered = [index for index in sampled if not _unfiltered(samplers[index].params)]
    for rows, draw in ((plain, _draw_plain), (filtered, _draw_filtered)):
        if rows:
            chosen[rows] = draw(logits[rows], [samplers[index] for index in rows])
    return [int(token) for token in chosen.tolist()]


def _unfiltered(params: SamplingParams) -> bool:
    return params.top_k == 0 and params.top_p == 1.0


def _draw_plain(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    return _invert(_probabilities(logits, samplers), samplers)


def _draw_filtered(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Temperature, then top_k, then top_p over what is left: the order of ``transformers``."""
    import torch

    probabilities, ids = _probabilities(logits, samplers).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    top_k = [sampler.params.top_k or logits.shape[-1] for sampler in samplers]
    probabilities = probabilities * (ranks < torch.tensor(top_k, device=logits.device)[:, None])
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    top_p = torch.tensor(
        [sampler.params.top_p for sampler in samplers], device=logits.device, dtype=torch.float64
    )
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities * (before < top_p[:, None])
    return ids.gather(-1, _invert(probabilities, samplers)[:, None])[:, 0]


def _probabilities(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """[B, V] float64: a sum over 10^5 float32 numbers would lose the tail of the distribution."""
    import torch

    temperatures = torch.tensor(
        [sampler.params.temperature for sampler in samplers], device=logits.device, dtype=torch.float64
    )
    return torch.softmax(logits.double() / temperatures[:, None], dim=-1)


def _invert(probabilities: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Inverse of the cumulative distribution at one uniform number per row: indices [B]."""
    import torch

    cumulative = probabilities.cumsum(dim=-1)
    uniform = torch.tensor(
        [sampler.uniform() for sampler in samplers], device=probabilities.device, dtype=torch.float64
    )
    points = uniform[:, None] * cumulative[:, -1:]
    # right=True: a point on a step belongs to the next token, so that one of probability 0 is never taken.
    return torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)
