"""What a request has said already, as corrections of its next logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from toolchain.runtime.types import SamplingParams


class Penalties:
    """Frequency, presence and repetition penalty of one request, kept up to date token by token.

    Frequency and presence count the tokens of the answer (OpenAI's definition), repetition those of prompt and
    answer (``RepetitionPenaltyLogitsProcessor`` of transformers, which it is applied like, before the other two).
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._frequency = params.frequency_penalty
        self._presence = params.presence_penalty
        self._repetition = params.repetition_penalty
        self._counts: dict[int, int] = {}
        self._seen = set(prompt_ids) if self._repetition != 1.0 else set[int]()
        self._subtracted: torch.Tensor | None = None
        self._factor: torch.Tensor | None = None

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        return (
            params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
            or params.repetition_penalty != 1.0
        )

    def add(self, token_id: int) -> None:
        """Count a generated token."""
        count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
        if self._subtracted is not None:
            self._subtracted[token_id] = self._frequency * count + self._presence
        if self._repetition != 1.0 and token_id not in self._seen:
            self._seen.add(token_id)
            if self._factor is not None:
                self._factor[token_id] = self._repetition

    def apply(self, logits: torch.Tensor) -> None:
        """Correct ``logits`` [V] (float32, one row) in place."""
        import torch

        if self._repetition != 1.0:
            if self._factor is None:
                self._factor = torch.ones_like(logits)
                self._factor[torch.tensor(sorted(self._seen), device=logits.device)] = self._repetition
            logits.copy_(torch.where(logits > 0, logits / self._factor, logits * self._factor))
        if self._frequency != 0.0 or self._presence != 0.0:
            if self._subtracted is None:
                self._subtracted = torch.zeros_like(logits)
                for token, count in self._counts.items():
                    self._subtracted[token] = self._frequency * count + self._presence
            logits.sub_(self._subtracted)
