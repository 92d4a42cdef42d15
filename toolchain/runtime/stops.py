"""Stop strings: no character of one is ever emitted, whatever the pieces in which text arrives."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text on, holding back what may become a stop string.

    The stop string that is completed first wins (of two completed by the same character, the longer). The
    result depends only on the text, not on how it was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was seen; everything after it is dropped."""

    def push(self, text: str) -> str:
        """Text that may be emitted now."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            emitted, self._held = self._held[:at], ""
            return emitted
        keep = self._possible_beginning()
        cut = len(self._held) - keep
        emitted, self._held = self._held[:cut], self._held[cut:]
        return emitted

    def flush(self) -> str:
        """The rest, when no more text comes: it did not become a stop string."""
        emitted, self._held = self._held, ""
        return emitted

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
