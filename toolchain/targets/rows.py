"""A row of a support table, and how rows are found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from toolchain.targets.version import parse_version

Model = Literal["dense", "moe"]
State = Literal["yes", "limited", "no"]
UNVERIFIED = "unverified"
"""Word in the note of every row that is a guess."""
REFERENCE = "VANILLA"
"""The MoE backend that is never chosen: a reference implementation without fused kernels."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a support table: what is not in any row is not supported."""

    formats: tuple[str, ...]
    sms: tuple[int, ...]
    """CUDA SM versions."""
    models: tuple[Model, ...] = ("dense", "moe")
    since: str = ""
    """First release known to have it; empty: every release of the table."""
    until: str = ""
    """First release without it; empty: still there."""
    state: State = "yes"
    """``limited``: it runs, and ``note`` says what is different. ``no``: known not to, and ``note`` says why."""
    backend: str = ""
    """``moe_config.backend`` that has the kernels; empty for dense layers and for targets without a choice."""
    preferred: bool = False
    """True for the backend that is chosen when nobody asks for another: the one of NVIDIA's deployment guides, else the
    one that ``AUTO`` resolves to in the main branch of 2026 (``resolve_moe_backend``), or the only one that serves."""
    ep: bool = True
    """Whether it runs with expert parallelism."""
    attention_dp: bool = True
    """Whether it runs behind attention data parallelism."""
    beside: tuple[str, ...] = ()
    """For a KV cache: formats of the weights that it runs with; empty: any."""
    note: str = ""
    source: str = ""
    """Document, commit, release or pull request."""

    @property
    def is_guess(self) -> bool:
        return UNVERIFIED in self.note

    def covers(self, *, format_name: str, sm: int, model: Model, version: str) -> bool:
        if format_name not in self.formats or sm not in self.sms or model not in self.models:
            return False
        return in_range(version, self.since, self.until)


def in_range(version: str, since: str, until: str) -> bool:
    """Whether ``version`` lies in [since, until); empty ends are open."""
    wanted = parse_version(version)
    return (not since or wanted >= parse_version(since)) and (not until or wanted < parse_version(until))


def dense(formats: str, sms: Iterable[int], source: str, **rest: Any) -> Row:
    """A row about Linears; ``formats`` separated by spaces."""
    return Row(formats=tuple(formats.split()), sms=tuple(sms), models=("dense",), source=source, **rest)


def moe(backend: str, formats: str, sms: Iterable[int], source: str, **rest: Any) -> Row:
    """A row about the experts of one backend; ``formats`` separated by spaces."""
    return Row(
        formats=tuple(formats.split()),
        sms=tuple(sms),
        models=("moe",),
        backend=backend,
        source=source,
        **rest,
    )


def also_on(
    rows: Iterable[Row], *, like: int, sms: tuple[int, ...], source: str, **changes: Any
) -> tuple[Row, ...]:
    """Copies of the rows that hold on SM ``like``, for other SMs that got the same from ``source`` on."""
    return tuple(
        replace(row, sms=sms, source=f"{source}; as SM{like}: {row.source}", **changes)
        for row in rows
        if like in row.sms
    )


def by_backend(rows: Iterable[Row]) -> Iterator[Row]:
    """The first row of each backend: what stands first is newer."""
    seen: set[str] = set()
    for row in rows:
        if row.backend not in seen:
            seen.add(row.backend)
            yield row


def by_merit(rows: Iterable[Row]) -> list[Row]:
    """The preferred first, then those without limits, then the others."""
    return sorted(rows, key=lambda row: (not row.preferred, row.state != "yes"))


def best(rows: Iterable[Row]) -> Row | None:
    """The row to run by: the preferred one, else the first without limits, else the first; None when none runs."""
    usable = [row for row in by_backend(rows) if row.state != "no" and row.backend != REFERENCE]
    return next(iter(by_merit(usable)), None)


def first(rows: Iterable[Row]) -> Row | None:
    """The first row, unless it says no."""
    row = next(iter(rows), None)
    return None if row is None or row.state == "no" else row
