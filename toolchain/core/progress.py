"""How long work reports itself. Rooms take a ``Progress``; only ``cli`` knows how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    def note(self, text: str) -> None:
        """One line of reasoning or state for people (stderr)."""

    def track(self, items: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` while drawing a bar with rate and ETA."""

    def meter(self, *, description: str, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """A bar in bytes, with bytes per second, ETA and this process's memory: call what it gives with each number of
        bytes that is done, from any thread."""


class Silent:
    """Progress that draws nothing: the default of every room, and what tests use."""

    def note(self, text: str) -> None:
        return None

    def track(self, items: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
        yield from items

    @contextmanager
    def meter(self, *, description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: None
