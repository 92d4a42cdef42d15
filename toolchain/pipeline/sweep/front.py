"""Which cells are worth having: size against KL, per model, and what the intervals do not tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.report.pareto import Point, front

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One cell among those that were measured alike: the same model, tokens and windows."""

    on_front: bool
    """No other is as small and as good, and better in one, by the figures as they are."""
    beaten_by: tuple[str, ...]
    """Cells that are no larger, and better beyond the intervals."""
    not_told_apart: tuple[str, ...]
    """Cells that are no larger, and whose interval of the mean KL overlaps."""

    @property
    def is_certain(self) -> bool:
        """Whether noise could not change it: beaten for certain, or by nobody that is no larger."""
        return bool(self.beaten_by) if not self.on_front else not self.not_told_apart

    @property
    def mark(self) -> str:
        """``front``, ``front ~`` where the lead lies within the intervals, ``~`` where the lag does; else nothing."""
        return " ".join(["front"] * self.on_front + ["~"] * (not self.is_certain))

    def to_json(self) -> dict[str, Any]:
        return {
            "on_front": self.on_front,
            "is_certain": self.is_certain,
            "beaten_by": list(self.beaten_by),
            "not_told_apart": list(self.not_told_apart),
        }


def standings(rows: Sequence[Row]) -> dict[str, Standing]:
    """Cell -> where it stands; only of cells of which size and KL are known.

    Overlap of 95 % intervals is a strict judge: figures of the same windows vary together, so some differences are
    real although their intervals touch. It never calls noise a difference.
    """
    known = [row for row in rows if row["bytes"] and row["kl_mean"] is not None and row["measured_alike"]]
    points = [
        Point(
            name=row["cell"],
            bits=row["bytes"],
            kl=row["kl_mean"],
            interval=None,
            group=row["measured_alike"],
        )
        for row in known
    ]
    best = front(points)
    found = {}
    for row in known:
        rivals = [
            other
            for other in known
            if other is not row
            and other["measured_alike"] == row["measured_alike"]
            and other["bytes"] <= row["bytes"]
        ]
        found[row["cell"]] = Standing(
            on_front=row["cell"] in best,
            beaten_by=tuple(other["cell"] for other in rivals if _below(other, row)),
            not_told_apart=tuple(
                other["cell"] for other in rivals if not _below(other, row) and not _below(row, other)
            ),
        )
    return found


def _below(one: Row, other: Row) -> bool:
    """Whether the KL of ``one`` is lower beyond both intervals; never where one has none (a single window)."""
    mine, theirs = one["kl_mean_interval"], other["kl_mean_interval"]
    return bool(mine and theirs) and mine[1] < theirs[0]
