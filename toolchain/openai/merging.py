"""The answers of one request, several at a time, in one sequence of pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from toolchain.openai.failures import ApiError
from toolchain.openai.upstream import Generation, Upstream
from toolchain.openai.wire import Piece

BUFFERED = 2
"""Pieces per answer that wait for a slow reader; after that the rest waits in Triton, for this request alone."""


async def merged(
    upstream: Upstream, generations: Sequence[Generation]
) -> AsyncGenerator[tuple[int, Piece], None]:
    """(index of the answer, its next piece) as they come, each answer in its order.

    The first failure ends all of them: raises its ApiError. Ends early once the generations are abandoned.
    """
    if len(generations) == 1:
        async with aclosing(generations[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    pumps = _Pumps(generations)
    for index in range(len(generations)):
        upstream.spawn(pumps.run(index))
    try:
        running = len(generations)
        while running:
            index, item = await pumps.queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, ApiError):
                raise item
            else:
                yield index, item
    finally:
        pumps.close()


class _Pumps:
    """One task per answer, all into one bounded queue."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._generations = generations
        self._closed = False
        self.queue: asyncio.Queue[tuple[int, Piece | ApiError | None]] = asyncio.Queue(
            BUFFERED * len(generations)
        )

    async def run(self, index: int) -> None:
        end: ApiError | None = None
        try:
            async with aclosing(self._generations[index].pieces()) as pieces:
                async for piece in pieces:
                    await self._put(index, piece)
        except ApiError as error:
            end = error
        await self._put(index, end)

    async def _put(self, index: int, item: Piece | ApiError | None) -> None:
        if not self._closed:
            await self.queue.put((index, item))

    def close(self) -> None:
        """Tell those that still run to stop. A full queue is emptied: each pump that waits for room puts one more
        piece, finds its generation abandoned and ends."""
        self._closed = True
        for generation in self._generations:
            generation.abandon()
        while not self.queue.empty():
            self.queue.get_nowait()
