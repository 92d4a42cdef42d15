"""Who has which pages of the KV cache: bookkeeping on the host, in whole requests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

SCRATCH_PAGE = 0
"""Belongs to nobody: rows that only fill up a batch write there."""


@dataclass(frozen=True)
class Holding:
    slot: int
    """Row of the table of pages."""
    pages: tuple[int, ...]


class PagePool:
    """Pages for at most ``slots`` requests. A request gets all the pages that its answer may need before it starts, so
    that none has to stop in the middle.

    ``static``: as many as the longest one may need, whatever it asks for.
    """

    def __init__(self, *, slots: int, pages: int, page_size: int, longest: int, static: bool = False) -> None:
        """``pages``: besides the scratch page. ``longest``: positions of the longest request."""
        self.page_size, self.slots, self.static, self.longest = page_size, slots, static, longest
        self.pages_per_slot = -(-longest // page_size)
        self.pages = pages
        self._free_pages = list(range(pages, 0, -1))
        self._free_slots = list(range(slots - 1, -1, -1))
        self._holdings: dict[int, tuple[Any, Holding]] = {}

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free_pages)

    def reserve(self, owner: Any, positions: int) -> Holding | None:
        """Pages for ``positions`` of ``owner``; None while there are too few. Asked again, what it has already."""
        found = self._holdings.get(id(owner))
        if found is not None:
            return found[1]
        count = self.pages_per_slot if self.static else -(-positions // self.page_size)
        if not self._free_slots or count > len(self._free_pages):
            return None
        pages = tuple(self._free_pages.pop() for _ in range(count))
        holding = Holding(self._free_slots.pop(), pages)
        self._holdings[id(owner)] = (owner, holding)
        return holding

    def of(self, owner: Any) -> Holding:
        return self._holdings[id(owner)][1]

    def keep_only(self, owners: Collection[Any]) -> None:
        """Take back the pages of all others."""
        kept = {id(owner) for owner in owners}
        for key in [key for key in self._holdings if key not in kept]:
            _, holding = self._holdings.pop(key)
            self._free_pages += reversed(holding.pages)
            self._free_slots.append(holding.slot)
