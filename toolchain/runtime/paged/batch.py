"""Running requests whose keys and values are in pages: they join and leave without any copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolchain.runtime.batch import Batch
from toolchain.runtime.paged.decoder import Decoder
from toolchain.runtime.paged.pages import KvPages
from toolchain.runtime.request import Request


class PagedBatch(Batch):
    """A batch whose rows own pages: joining and leaving copies nothing."""

    def __init__(
        self,
        decoder: Decoder,
        pages: KvPages,
        requests: Sequence[Request],
        lengths: Sequence[int],
        cache: Any,
    ) -> None:
        self._decoder, self._pages = decoder, pages
        self.requests = list(requests)
        self._lengths = list(lengths)
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            pages.adopt(request, cache, row, length)

    def step(self) -> None:
        """One more token for every row."""
        self._lengths = [length + 1 for length in self._lengths]
        slots = [self._pages.pool.of(request).slot for request in self.requests]
        tokens = [request.generated[-1] for request in self.requests]
        self.accept(self._decoder.step(tokens, slots, self._lengths))

    def absorb(self, other: Batch) -> None:
        """Take over the rows of ``other``, which must not be used afterwards."""
        self.requests += other.requests
        self._lengths += other._lengths

    def shrink(self) -> None:
        """Forget rows that have ended; their pages go back when the scheduler sweeps."""
        rows = [index for index, request in enumerate(self.requests) if not request.ended.is_set()]
        self.requests = [self.requests[index] for index in rows]
        self._lengths = [self._lengths[index] for index in rows]
