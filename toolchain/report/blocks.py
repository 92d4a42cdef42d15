"""What a page is made of. Sections are built as data; only the template knows HTML, and it escapes all text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from toolchain.report.figures import Figure


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    text: str
    tone: str = ""
    """``missing`` (an input is not there), ``warning``, ``note`` (small print), or nothing."""
    kind: str = "paragraph"


@dataclass(frozen=True, kw_only=True)
class Cell:
    text: str
    value: float | str | None = None
    """What a column is sorted by; None sorts last."""
    tone: str = ""
    """``good``, ``bad``, ``muted`` or nothing. Never the only carrier of a meaning."""
    detail: str = ""
    """A second, smaller line: an interval, a unit of another kind."""


@dataclass(frozen=True, kw_only=True)
class Column:
    title: str
    numeric: bool = False
    """Right-aligned, sorted as numbers."""
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    kind: str = "table"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Name and value pairs."""

    items: tuple[tuple[str, str], ...]
    kind: str = "facts"


@dataclass(frozen=True, kw_only=True)
class Code:
    label: str
    lines: tuple[str, ...]
    kind: str = "code"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One key figure."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    items: tuple[Tile, ...]
    kind: str = "tiles"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generated text: what both models wrote, then what differs."""

    name: str
    shared: str
    own: str


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    prompt: str
    answers: tuple[Answer, ...]
    verdict: str
    kind: str = "side_by_side"


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Shown on demand, always printed in its short form."""

    summary: str
    blocks: tuple[Block, ...]
    kind: str = "fold"


Block = Paragraph | Table | Facts | Code | Tiles | SideBySide | Fold | Figure


@dataclass(frozen=True, kw_only=True)
class Section:
    id: str
    title: str
    blocks: tuple[Block, ...]
    short: str = ""
    """In the list of sections; else the title."""


@dataclass(frozen=True, kw_only=True)
class Banner:
    """The verdict at the top. ``tone``: ``good``, ``bad`` or ``open``."""

    tone: str
    headline: str
    sentences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    title: str
    subtitle: str
    banners: tuple[Banner, ...]
    sections: tuple[Section, ...]
    footer: str
    wide: bool = False
    """For tables of many columns."""

    @property
    def figures(self) -> tuple[Figure, ...]:
        return tuple(_figures(block for section in self.sections for block in section.blocks))


def missing(what: str, remedy: str) -> Paragraph:
    """The one line that stands where an input is not there."""
    return Paragraph(text=f"{what} not measured: {remedy}", tone="missing")


def table(caption: str, columns: list[Column], rows: list[list[Cell | str]]) -> Table:
    """A Table; plain strings become cells that sort by their text."""
    cells = tuple(
        tuple(cell if isinstance(cell, Cell) else Cell(text=cell, value=cell) for cell in row) for row in rows
    )
    return Table(caption=caption, columns=tuple(columns), rows=cells)


def _figures(blocks: Iterable[Block]) -> list[Figure]:
    found: list[Figure] = []
    for block in blocks:
        if isinstance(block, Figure):
            found.append(block)
        elif isinstance(block, Fold):
            found += _figures(block.blocks)
    return found
