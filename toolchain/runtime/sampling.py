"""The next token of each row: greedy, or sampled so that a row's result does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolchain.runtime.penalties import Penalties
from toolchain.runtime.types import TokenLogprob

if TYPE_CHECKING:
    import torch

    from toolchain.runtime.types import SamplingParams


class Sampler:
    """What choosing the tokens of one request needs: its random numbers, penalties and log probabilities.

    The device never draws: one uniform number per token is drawn on the CPU, so the same seed gives the same numbers
    on CPU and GPU and in any batch.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        import torch

        self.params = params
        self.penalties = Penalties(params, prompt_ids) if Penalties.wanted(params) else None
        self.greedy = params.temperature == 0
        self.plain = self.greedy and self.penalties is None and params.logprobs is None
        """Whether the highest logit is all that is asked for."""
        self.logprob: TokenLogprob | None = None
        """Of the token that was chosen last, when the request asks for log probabilities."""
        self._generator: torch.Generator | None = None
        if not self.greedy:
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

    Ties of a greedy row go to the lowest id, as in ``transformers``. Sets ``logprob`` of the samplers that want it.
    """
    if all(sampler.plain for sampler in samplers):
        return _ids(logits.argmax(dim=-1))
    raw = logits
    logits = raw.float()
    penalized = [index for index, sampler in enumerate(samplers) if sampler.penalties is not None]
    if penalized:
        logits = logits.clone()
        for index in penalized:
            samplers[index].penalties.apply(logits[index])  # type: ignore[union-attr]
    chosen = logits.argmax(dim=-1)
    sampled = [index for index, sampler in enumerate(samplers) if not sampler.greedy]
    plain = [index for index in sampled if _unfiltered(samplers[index].params)]
    filtered = [index for index in sampled if not _unfiltered(samplers[index].params)]
    for rows, draw in ((plain, _draw_plain), (filtered, _draw_filtered)):
        if rows:
            chosen[rows] = draw(logits[rows], [samplers[index] for index in rows])
    tokens = _ids(chosen)
    _set_logprobs(raw, samplers, tokens)
    return tokens


def _ids(chosen: torch.Tensor) -> list[int]:
    tokens: list[int] = chosen.tolist()
    return tokens


def _set_logprobs(logits: torch.Tensor, samplers: Sequence[Sampler], tokens: Sequence[int]) -> None:
    """Of the raw distribution: ``logits`` [B, V] as the model gave them."""
    import torch

    rows = [index for index, sampler in enumerate(samplers) if sampler.params.logprobs is not None]
    if not rows:
        return
    logprobs = torch.log_softmax(logits[rows].float(), dim=-1)
    ids = torch.tensor([[tokens[index]] for index in rows], device=logits.device)
    own = logprobs.gather(-1, ids)[:, 0].tolist()
    counts = [samplers[index].params.logprobs or 0 for index in rows]
    top = logprobs.topk(min(max(counts), logprobs.shape[-1]), dim=-1)
    best_ids, best = top.indices.tolist(), top.values.tolist()
    for at, index in enumerate(rows):
        samplers[index].logprob = TokenLogprob(
            token_id=tokens[index],
            logprob=own[at],
            top=tuple(zip(best_ids[at], best[at], strict=True))[: counts[at]],
        )


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
