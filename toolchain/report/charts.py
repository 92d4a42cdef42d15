"""The kinds of chart that sections draw, in altair. Imported late: altair takes half a second."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from toolchain.report.palette import categories, colour

Rows = Sequence[Mapping[str, Any]]
DASHES: tuple[tuple[str, list[int]], ...] = (("solid", [1, 0]), ("dashed", [7, 4]), ("dotted", [2, 3]))
"""Name of a line style in a legend -> its pattern."""


def data(rows: Rows) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])


def axis_of(values: int) -> alt.Axis:
    """For an index such as the layer's: at most about 16 labels."""
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, 200, 500) if values <= 16 * step)
    return alt.Axis(labelAngle=0, ticks=False, domain=False, values=list(range(0, values, step)))


def lines(
    rows: Rows, *, series: Sequence[str], x_title: str, y_title: str, y_format: str, zero: bool, layers: int
) -> alt.LayerChart:
    """Rows of ``x`` (an index below ``layers``), ``y`` and ``series``, one line with points for each."""
    names = list(series)
    base = alt.Chart(data(rows)).encode(
        x=alt.X(
            "x:Q",
            title=x_title,
            scale=alt.Scale(domain=[-0.5, layers - 0.5], nice=False),
            axis=layer_axis(layers),
        ),
        y=alt.Y(
            "y:Q", title=y_title, scale=alt.Scale(zero=zero), axis=alt.Axis(format=y_format, tickCount=5)
        ),
        color=alt.Color("series:N", scale=alt.Scale(domain=names, range=categories(len(names))), legend=None),
        tooltip=[
            alt.Tooltip("series:N", title="figure"),
            alt.Tooltip("x:Q", title=x_title),
            alt.Tooltip("y:Q", title="value", format=y_format.replace("~", "")),
        ],
    )
    patterns = [DASHES[index % len(DASHES)][1] for index in range(len(names))]
    dash = alt.StrokeDash("series:N", scale=alt.Scale(domain=names, range=patterns), legend=None)
    return alt.layer(
        base.mark_line(strokeWidth=2).encode(strokeDash=dash),
        base.mark_point(filled=True, size=34, opacity=1),
    )


def curve(points: Sequence[tuple[float, float]], *, x_title: str, y_title: str) -> alt.LayerChart:
    """One line over (x, y), from zero."""
    rows = [{"x": x, "y": y} for x, y in points]
    base = alt.Chart(data(rows)).encode(
        x=alt.X("x:Q", title=x_title, axis=alt.Axis(grid=False, domain=False, format="~s")),
        y=alt.Y("y:Q", title=y_title, scale=alt.Scale(zero=True), axis=alt.Axis(format="~g", tickCount=5)),
        tooltip=[alt.Tooltip("x:Q", title=x_title), alt.Tooltip("y:Q", title=y_title, format=".4g")],
    )
    return alt.layer(
        base.mark_line(strokeWidth=2, color=colour("c1")),
        base.mark_point(filled=True, size=34, opacity=1, color=colour("c1")),
    )


def layer_axis(values: int) -> alt.Axis:
    """Whole numbers on a continuous scale."""
    found = axis_of(values)
    return alt.Axis(values=found.values, grid=False, domain=False, format="d")


def log_scale(lows: Sequence[float], highs: Sequence[float]) -> tuple[alt.Scale, alt.Axis]:
    """A logarithmic scale around positive values, with ticks at decades (and at 2 and 5, where those are few)."""
    low, high = min(lows) * 0.8, max(highs) * 1.25
    ticks = log_ticks(low, high)
    return (
        alt.Scale(type="log", domain=[low, high], nice=False),
        alt.Axis(format="~g", values=ticks, gridOpacity=0.6),
    )


def log_ticks(low: float, high: float) -> list[float]:
    """1e-5, 1e-4 ...; with fewer than three decades also 2e-5, 5e-5."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = sum(low <= 10.0**exponent <= high for exponent in exponents) < 3
    places = [
        float(f"{digit}e{exponent}") for exponent in exponents for digit in ((1, 2, 5) if few else (1,))
    ]
    return [place for place in places if low <= place <= high]


def bars(rows: Rows, *, x_title: str, y_title: str, y_format: str, count: int) -> alt.Chart:
    """Rows of ``x`` (an index below ``count``) and ``y``."""
    return (
        alt.Chart(data(rows))
        .mark_bar(color=colour("c1"))
        .encode(
            x=alt.X(
                "x:O",
                title=x_title,
                axis=axis_of(count),
                scale=alt.Scale(padding=0.15 if count > 12 else 0.4),
            ),
            y=alt.Y("y:Q", title=y_title, axis=alt.Axis(format=y_format, tickCount=5)),
            tooltip=[alt.Tooltip("x:O", title=x_title), alt.Tooltip("y:Q", title=y_title, format=y_format)],
        )
    )


def grid(
    rows: Rows,
    *,
    columns: int,
    x_title: str,
    y: alt.Y,
    fill: alt.Color,
    tooltip: list[alt.Tooltip],
    gap: bool,
) -> alt.Chart:
    """Rectangles at ``x`` (an index below ``columns``) and ``y``. ``gap``: a line of the page's colour between them."""
    stroke = {"stroke": colour("page"), "strokeWidth": 1} if gap else {}
    return (
        alt.Chart(data(rows))
        .mark_rect(**stroke)
        .encode(x=alt.X("x:O", title=x_title, axis=axis_of(columns)), y=y, color=fill, tooltip=tooltip)
    )
