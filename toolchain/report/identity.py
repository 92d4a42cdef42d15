"""What must be equal for the figures of two engines to compare, said loudly where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolchain.report.blocks import Banner, Cell, Column, Section, table
from toolchain.report.documents import number, part, text
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import NOTHING, count

PARTS = (
    ("model", "source model"),
    ("tokens", "tokens"),
    ("token_hash", "token hash"),
    ("window", "window"),
    ("stride", "stride"),
    ("bos", "begin-of-text token"),
    ("emulation", "emulation"),
)
"""What figures rest on, and what it is called."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Engines of one letter were measured on the same tokens in the same way, against the same model."""

    letter: str
    values: tuple[str, ...]
    """In the order of PARTS."""


def groups_of(engines: Sequence[EngineFiles]) -> list[Identity | None]:
    """One per engine; None where nothing was measured. Letters count from A in the order of the engines."""
    letters: dict[tuple[str, ...], str] = {}
    found: list[Identity | None] = []
    for engine in engines:
        if not part(engine.metrics, "data"):
            found.append(None)
            continue
        values = _values(engine)
        letter = letters.setdefault(values, chr(ord("A") + len(letters) % 26))
        found.append(Identity(letter=letter, values=values))
    return found


def _values(engine: EngineFiles) -> tuple[str, ...]:
    metrics, data = engine.metrics, part(engine.metrics, "data")
    stride = text(data, "stride") or text(
        data, "window"
    )  # before strides were written, windows did not overlap
    values = {
        "model": text(engine.plan, "model_identity") or text(metrics, "baseline"),
        "tokens": text(metrics, "tokens"),
        "token_hash": text(data, "token_hash"),
        "window": text(data, "window"),
        "stride": stride,
        "bos": str(data.get("bos")),
        "emulation": text(metrics, "emulation") or "not said",
    }
    return tuple(values[key] for key, _ in PARTS)


def warnings(
    engines: Sequence[EngineFiles], names: Sequence[str], groups: Sequence[Identity | None]
) -> tuple[Banner, ...]:
    """One banner when figures do not compare, with what differs."""
    found: dict[str, list[str]] = {}
    kinds: dict[str, Identity] = {}
    for name, group in zip(names, groups, strict=True):
        if group is not None:
            found.setdefault(group.letter, []).append(name)
            kinds[group.letter] = group
    if len(found) < 2:
        return ()
    differing = [
        words
        for index, (_, words) in enumerate(PARTS)
        if len({kind.values[index] for kind in kinds.values()}) > 1
    ]
    sentences = (
        f"What differs: {', '.join(differing)}. Compare only engines of one letter; "
        "the table and the plot keep them apart.",
        *(f"{letter}: {', '.join(members)}." for letter, members in found.items()),
    )
    return (
        Banner(
            tone="bad",
            headline="These figures were not measured alike: they do not all compare",
            sentences=sentences,
        ),
    )


def data_section(
    engines: Sequence[EngineFiles], names: Sequence[str], groups: Sequence[Identity | None]
) -> Section:
    rows: list[list[Cell | str]] = []
    for engine, name, group in zip(engines, names, groups, strict=True):
        metrics, data = engine.metrics, part(engine.metrics, "data")
        digest, model = text(data, "token_hash"), text(engine.plan, "model_identity")
        rows.append(
            [
                name,
                group.letter if group else NOTHING,
                text(data, "source") or "not measured",
                Cell(text=count(number(metrics, "tokens")), value=number(metrics, "tokens")),
                Cell(text=count(number(data, "window")), value=number(data, "window")),
                Cell(text=count(number(data, "stride")), value=number(data, "stride")),
                text(metrics, "emulation") or NOTHING,
                digest[:12] or NOTHING,
                model[:12] or NOTHING,
            ]
        )
    columns = [Column(title=name) for name in ("Engine", "Alike", "Evaluated on")]
    columns += [Column(title=name, numeric=True) for name in ("Tokens", "Window", "Stride")]
    columns += [Column(title=name) for name in ("Emulation", "Token hash", "Source model")]
    found = table("What each engine was measured on; engines of one letter compare", columns, rows)
    return Section(id="data", title="Evaluation data", short="Data", blocks=(found,))
