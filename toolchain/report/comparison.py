"""Several engines side by side: one table, the size-quality plot, and what must be equal for figures to compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolchain.core.errors import UsageError
from toolchain.core.files import atomic_write_text
from toolchain.report.blocks import Banner, Block, Page, Section
from toolchain.report.identity import Identity, data_section, groups_of, warnings
from toolchain.report.inputs import EngineFiles, read_engine
from toolchain.report.overview import layers_section, overview, speed_section
from toolchain.report.page import render
from toolchain.report.pareto import Point, pareto
from toolchain.report.verdict import judge

FILE = "index.html"


def write_comparison(engines: Sequence[Path], output: Path) -> Path:
    """Write ``output/index.html``, atomically; returns its path. Engines keep their order.

    UsageError TC-803 for fewer than two engines or one given twice, TC-801 for a directory that is none.
    """
    places = [engine.resolve() for engine in engines]
    if len(places) < 2 or len(set(places)) < len(places):
        raise UsageError(
            f"a comparison of {len(places)} engines, {len(set(places))} of them different; expected two or more",
            hint="`toolchain report ENGINE` reports on a single one",
            code="TC-803",
        )
    path = output / FILE
    atomic_write_text(path, render(comparison_page([read_engine(engine) for engine in engines])))
    return path


def comparison_page(engines: Sequence[EngineFiles]) -> Page:
    names = names_of(engines)
    groups = groups_of(engines)
    points = points_of(engines, names, groups)
    blocks: list[Block] = [overview(engines, names, groups)]
    figure = pareto(points)
    sections = [Section(id="summary", title="Side by side", short="Table", blocks=tuple(blocks))]
    sections.append(
        Section(id="pareto", title="Size against quality", short="Size and quality", blocks=figure)
    )
    sections += [layers_section(engines, names, groups), speed_section(engines, names)]
    sections.append(data_section(engines, names, groups))
    return Page(
        title=f"{len(engines)} engines compared",
        subtitle=", ".join(names),
        banners=(*warnings(engines, names, groups), _verdicts(engines, names)),
        sections=tuple(sections),
        footer="Written by toolchain from the files of the engines. Every figure is read from them.",
        wide=True,
    )


def names_of(engines: Sequence[EngineFiles]) -> list[str]:
    """Directory names; with the parent's, or the whole path, where two are the same."""
    names = [engine.name for engine in engines]
    places = [engine.directory.resolve() for engine in engines]
    longer = [f"{place.parent.name}/{place.name}" for place in places]
    if len(set(longer)) < len(longer):
        longer = [str(place) for place in places]
    return [name if names.count(name) == 1 else other for name, other in zip(names, longer, strict=True)]


def points_of(
    engines: Sequence[EngineFiles], names: Sequence[str], groups: Sequence[Identity | None]
) -> list[Point]:
    """Engines of which size and KL are known."""
    from toolchain.report.documents import interval, number
    from toolchain.report.sections.summary import effective_bits

    found = []
    for engine, name, group in zip(engines, names, groups, strict=True):
        bits, kl = effective_bits(engine), number(engine.metrics, "kl_mean")
        if bits is not None and kl is not None and group is not None:
            ends = interval(engine.metrics, "kl_mean")
            found.append(Point(name=name, bits=bits, kl=kl, interval=ends, group=group.letter))
    return found


def _verdicts(engines: Sequence[EngineFiles], names: Sequence[str]) -> Banner:
    verdicts = [judge(engine) for engine in engines]
    states = [verdict.state for verdict in verdicts]
    words = (("fit", "fit to serve"), ("not fit", "not fit to serve"), ("open", "without a verdict"))
    found = [f"{states.count(state)} {word}" for state, word in words if state in states]
    same = len(found) == 1
    headline = (
        f"All engines are {dict(words)[states[0]]}" if same else f"Of {len(names)} engines {', '.join(found)}"
    )
    tone = {"fit": "good", "not fit": "bad"}.get(states[0], "open") if same else "open"
    sentences = tuple(
        f"{name}: {verdict.headline[0].lower()}{verdict.headline[1:]}."
        for name, verdict in zip(names, verdicts, strict=True)
    )
    return Banner(tone=tone, headline=headline, sentences=sentences)
