"""One request as it was seen by its client, and the requests of one repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Record:
    """One request. Times in seconds of time.perf_counter(), which all processes of a machine share on Linux."""

    started_s: float
    """From here its latency counts: when it was sent; in an open loop when it was due."""
    finished_s: float
    piece_s: tuple[float, ...] = ()
    """Arrival of each response that brought text."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    sent_s: float | None = None
    """When it really was sent; None: at ``started_s``."""
    measured: bool = True
    """False: warm-up, or a request that only keeps the load up while measured ones run."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One repeat of one level."""

    records: Sequence[Record]
    """All of them; ``measured`` ones make the figures, all of them the throughput within the window."""
    start_s: float
    end_s: float
    """The window: the load was complete all through it."""
    open_loop: bool = False
    held_back: int = 0
    outstanding_peak: int = 0

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def counted(self) -> list[Record]:
        return [record for record in self.records if record.measured]

    def tokens_within(self) -> float:
        """Output tokens that arrived within the window: a response has its share of the tokens of its request."""
        return sum(
            record.output_tokens
            * sum(self.start_s <= at <= self.end_s for at in record.piece_s)
            / len(record.piece_s)
            for record in self.records
            if record.error is None and record.piece_s
        )

    def requests_within(self) -> float:
        """Successful requests of the window.

        Open loop: those that ended in it. Closed loop: each with the share of its time that lies in it. Users that
        began together end together: counted by their ends, a window from one such wave to another would hold one wave
        too many.
        """
        good = [record for record in self.records if record.error is None]
        if self.open_loop:
            return sum(self.start_s <= record.finished_s <= self.end_s for record in good)
        return sum(self._share(record.started_s, record.finished_s) for record in good)

    def _share(self, start_s: float, end_s: float) -> float:
        if end_s <= start_s:
            return float(self.start_s <= end_s <= self.end_s)
        return max(0.0, min(end_s, self.end_s) - max(start_s, self.start_s)) / (end_s - start_s)
