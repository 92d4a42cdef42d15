"""Reading prompts: short ones together, long ones piece by piece, so that running requests never wait for long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolchain.runtime import kv
from toolchain.runtime.batch import Batch
from toolchain.runtime.model import Runner
from toolchain.runtime.request import Request


class Prefill:
    """Some prompts on their way into a batch: several that fit one forward, or one of any length."""

    def __init__(self, runner: Runner, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self._runner = runner
        self._cache: Any = kv.new_cache() if runner.mergeable else None
        self._done = 0
        """Positions of a single prompt that are in the cache."""

    @property
    def positions(self) -> int:
        """Cost of the next ``advance``."""
        pieces = self._pieces()
        return len(pieces) * max(len(piece) for piece in pieces)

    def advance(self) -> Batch | None:
        """One forward. Returns the batch, with the first token of each answer, once the prompts are read."""
        pieces = self._pieces()
        logits, self._cache = self._runner.forward(pieces, [self._done] * len(pieces), self._cache)
        self._done += len(pieces[0])
        if len(pieces) == 1 and self._done < len(self.requests[0].prompt_ids):
            return None
        lengths = [len(request.prompt_ids) for request in self.requests]
        batch = self._runner.batch(self.requests, lengths, self._cache)
        batch.accept(logits)
        return batch

    def _pieces(self) -> list[list[int]]:
        prompts = [request.prompt_ids for request in self.requests]
        # A model with a cache of its own kind may not be able to go on from the middle of a prompt.
        if len(prompts) > 1 or not self._runner.mergeable:
            return prompts
        return [prompts[0][self._done : self._done + self._runner.prefill_tokens]]


def group(runner: Runner, requests: Sequence[Request]) -> list[Prefill]:
    """Prefills for ``requests``, neighbours in length together, so that they need little padding."""
    groups: list[list[Request]] = []
    for request in sorted(requests, key=lambda item: len(item.prompt_ids)):
        width = len(request.prompt_ids)
        if groups and runner.mergeable and width * (len(groups[-1]) + 1) <= runner.prefill_tokens:
            groups[-1].append(request)
        else:
            groups.append([request])
    return [Prefill(runner, members) for members in groups]
