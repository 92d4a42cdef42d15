"""A batch of running requests that share one KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.runtime import kv
from toolchain.runtime.sampling import choose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolchain.runtime.model import Runner
    from toolchain.runtime.request import Request


class Batch:
    """Rows whose keys and values end at the same column. The widest has no padding: ``shrink`` sees to that.

    So the whole geometry is ``lengths``: mask and positions are computed from it in every step.
    """

    def __init__(
        self, runner: Runner, requests: Sequence[Request], lengths: Sequence[int], cache: Any
    ) -> None:
        self._runner = runner
        self.requests = list(requests)
        self._lengths = list(lengths)
        """Positions of each row that the cache holds."""
        self._cache = cache

    def step(self) -> None:
        """One more token for every row."""
        tokens = [request.generated[-1:] for request in self.requests]
        logits, self._cache = self._runner.forward(tokens, self._lengths, self._cache)
        self._lengths = [length + 1 for length in self._lengths]
        self.accept(logits)

    def absorb(self, other: Batch) -> None:
        """Take over the rows of ``other``, which must not be used afterwards."""
        kv.merge(self._cache, max(self._lengths), other._cache, max(other._lengths))
        self.requests += other.requests
        self._lengths += other._lengths

    def shrink(self) -> None:
        """Drop rows that have ended, and the padding that no row needs any more."""
        rows = [index for index, request in enumerate(self.requests) if not request.ended.is_set()]
        if len(rows) == len(self.requests):
            return
        lengths = [self._lengths[index] for index in rows]
        if rows:
            kv.keep(self._cache, rows, max(self._lengths) - max(lengths))
        self.requests = [self.requests[index] for index in rows]
        self._lengths = lengths

    def accept(self, logits: Any) -> None:
        """Choose the next token of every row from ``logits`` [B, V]. Rows may end with it: call ``shrink``."""
        tokens = choose(logits, [request.sampler for request in self.requests])
        for request, token in zip(self.requests, tokens, strict=True):
            request.accept(token)
