"""Whether quantization sends tokens to other experts."""

from __future__ import annotations

from typing import Any

from toolchain.report.blocks import Block, Cell, Column, Facts, Paragraph, Section, Table, missing, table
from toolchain.report.documents import Document, number, numbers
from toolchain.report.figures import Figure, Key, draw
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import NOTHING, PERCENT, percent, signed_percent
from toolchain.report.palette import categories
from toolchain.report.sections.experts import is_moe
from toolchain.report.sections.layer_error import measured_layers

SERIES = {
    "router_agreement": "expert choices in common",
    "router_set_agreement": "whole top-k set the same",
    "router_weighted_agreement": "overlap weighted by routing weights",
}
SHOWN = 10
"""Experts whose load changed most."""


def section(files: EngineFiles) -> Section:
    title, metrics = "Router agreement and expert load", files.metrics
    series = _series(metrics)
    if not series:
        if not is_moe(files.plan):
            words = "This model has no router."
            return Section(
                id="routing", short="Routing", title=title, blocks=(Paragraph(text=words, tone="missing"),)
            )
        remedy = files.to_measure
        return Section(
            id="routing", short="Routing", title=title, blocks=(missing("Router agreement was", remedy),)
        )
    blocks: list[Block] = [Facts(items=_facts(metrics)), _agreement(series)]
    layers = measured_layers(metrics)
    shifts = [
        (layer, shift) for layer, item in layers.items() if (shift := number(item, "load_shift")) is not None
    ]
    if shifts:
        blocks.append(_shift(shifts, max(layers) + 1))
        if (moved := _moved(layers)) is not None:
            blocks.append(moved)
    else:
        remedy = files.to_measure
        blocks.append(missing("Expert load shift was", remedy))
    return Section(id="routing", short="Routing", title=title, blocks=tuple(blocks))


def _series(metrics: Document) -> dict[str, list[tuple[int, float]]]:
    """Words of a series -> (layer, share)."""
    layers = measured_layers(metrics)
    found = {}
    for key, words in SERIES.items():
        points = [
            (layer, value) for layer, item in layers.items() if (value := number(item, key)) is not None
        ]
        if points:
            found[words] = points
    if not found and (values := numbers(metrics.get("router_agreement_by_layer"))):
        found[SERIES["router_agreement"]] = list(enumerate(values))
    return found


def _facts(metrics: Document) -> tuple[tuple[str, str], ...]:
    found = [(words.capitalize(), percent(number(metrics, key))) for key, words in SERIES.items()]
    return tuple((words, value) for words, value in found if value != NOTHING)


def _agreement(series: dict[str, list[tuple[int, float]]]) -> Figure:
    from toolchain.report.charts import DASHES, lines

    rows: list[dict[str, Any]] = [
        {"x": layer, "y": value, "series": words}
        for words, points in series.items()
        for layer, value in points
    ]
    last = max(row["x"] for row in rows)
    chart = lines(
        rows,
        series=list(series),
        x_title="layer",
        y_title="agreement",
        y_format="~%",
        zero=False,
        layers=int(last) + 1,
    )
    keys = tuple(
        Key(label=words, colour=shade, style=DASHES[index % len(DASHES)][0])
        for index, (words, shade) in enumerate(zip(series, categories(len(series)), strict=True))
    )
    words, points = next(iter(series.items()))
    low = min(points, key=lambda point: point[1])
    alt = (
        f"Lines over {len(points)} layers. {words.capitalize()}: lowest {percent(low[1])} in layer {low[0]}."
    )
    return draw(
        chart,
        id="router",
        title="Router agreement of each layer",
        alt=alt,
        keys=keys,
        note="Share of tokens or choices; the axis does not begin at zero.",
    )


def _shift(shifts: list[tuple[int, float]], layers: int) -> Figure:
    from toolchain.report.charts import bars

    rows = [{"x": layer, "y": value} for layer, value in shifts]
    chart = bars(rows, x_title="layer", y_title="tokens moved", y_format="~%", count=layers)
    most = max(shifts, key=lambda item: item[1])
    return draw(
        chart,
        id="load-shift",
        title="Share of expert load that moved to other experts",
        alt=f"Bars over {len(shifts)} layers: at most {percent(most[1])} in layer {most[0]}.",
        note="Total variation distance between the experts' shares of tokens before and after quantization.",
        height=160,
    )


def _moved(layers: dict[int, Document]) -> Table | None:
    """The experts that gained or lost most."""
    found: list[tuple[float, int, int, float, float]] = []
    for layer, item in layers.items():
        before, after = numbers(item.get("baseline_load")), numbers(item.get("load"))
        pairs = zip(before, after, strict=False) if len(before) == len(after) else ()
        found += [(new - old, layer, expert, old, new) for expert, (old, new) in enumerate(pairs)]
    if not found:
        return None
    found.sort(key=lambda item: (-abs(item[0]), item[1], item[2]))
    rows: list[list[Cell | str]] = []
    for change, layer, expert, old, new in found[:SHOWN]:
        cells: list[Any] = [Cell(text=str(layer), value=layer), Cell(text=str(expert), value=expert)]
        cells += [Cell(text=percent(old), value=old), Cell(text=percent(new), value=new)]
        rows.append(
            [*cells, Cell(text=signed_percent(change).replace(PERCENT, "\u00a0points"), value=change)]
        )
    names = ("Layer", "Expert", "Load before", "Load after", "Change")
    caption = f"The {len(rows)} experts whose share of tokens changed most"
    return table(caption, [Column(title=name, numeric=True) for name in names], rows)
