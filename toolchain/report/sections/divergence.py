"""The distribution of KL over tokens."""

from __future__ import annotations

from typing import Any

from toolchain.report.blocks import Block, Cell, Column, Section, Table, missing, table
from toolchain.report.documents import Document, interval, number, numbers, part
from toolchain.report.figures import Figure, Key, draw
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import between, count, percent, significant
from toolchain.report.palette import colour

MARKS = (
    ("kl_median", "median", "dashed"),
    ("kl_mean", "mean", "solid"),
    ("kl_p99", "99th percentile", "dotted"),
)
"""Key in metrics.json, words, line style."""
DIRECTIONS = {"kl": "KL(baseline || quantized)", "reverse_kl": "KL(quantized || baseline)"}


def section(files: EngineFiles) -> Section:
    title, metrics = "KL over tokens", files.metrics
    remedy = files.to_measure
    if number(metrics, "kl_mean") is None:
        return Section(id="kl", short="KL", title=title, blocks=(missing("KL was", remedy),))
    histogram = part(metrics, "kl_histogram")
    edges, counts = numbers(histogram.get("edges")), numbers(histogram.get("counts"))
    blocks: list[Block] = [_table(metrics)]
    if len(edges) == len(counts) + 1 and sum(counts) > 0:
        blocks.append(_figure(metrics, edges, counts))
    else:
        blocks.append(missing("The histogram was", remedy))
    return Section(id="kl", short="KL", title=title, blocks=tuple(blocks))


def _table(metrics: Document) -> Table:
    rows: list[list[Cell | str]] = []
    for prefix, words in DIRECTIONS.items():
        if number(metrics, f"{prefix}_mean") is None:
            continue
        cells: list[Cell | str] = [words]
        for name in ("mean", "median", "p99"):
            value, ends = number(metrics, f"{prefix}_{name}"), interval(metrics, f"{prefix}_{name}")
            cells.append(Cell(text=significant(value), value=value, detail=between(ends)))
        rows.append(cells)
    columns = [Column(title="Nats per token")]
    columns += [Column(title=name, numeric=True) for name in ("Mean", "Median", "99th percentile")]
    return table("Divergence of next-token distributions", columns, rows)


def _figure(metrics: Document, edges: list[float], counts: list[float]) -> Figure:
    edges = _positive(edges)
    tokens = sum(counts)
    first, last = _occupied(counts)
    rows = [
        {
            "low": edges[index],
            "high": edges[index + 1],
            "share": counts[index] / tokens,
            "tokens": counts[index],
        }
        for index in range(first, last + 1)
    ]
    marks = [
        (words, value, line) for key, words, line in MARKS if (value := number(metrics, key)) is not None
    ]
    marks = [mark for mark in marks if edges[first] <= mark[1] <= edges[last + 1]]
    keys = [
        Key(label=f"{words} {significant(value)}", colour=colour("ink"), style=line)
        for words, value, line in marks
    ]
    return draw(
        _bins(rows, [(value, line) for _, value, line in marks]),
        id="kl-histogram",
        title=f"KL of {count(tokens)} tokens",
        alt=_alt(metrics, rows),
        keys=tuple(keys),
        note="Logarithmic scale; bins of equal width on it, the outer ones of the measurement open.",
    )


def _bins(rows: list[dict[str, float]], marks: list[tuple[float, str]]) -> Any:
    """``marks``: values at which a rule stands, and its line style."""
    from toolchain.report.charts import DASHES, alt, data, log_ticks

    low, high = rows[0]["low"], rows[-1]["high"]
    x = alt.X(
        "low:Q",
        title="KL (nats per token)",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=alt.Axis(format="~g", grid=False, values=log_ticks(low, high)),
    )
    y = alt.Y("share:Q", title="share of tokens", axis=alt.Axis(format="~%", tickCount=5))
    tips = [alt.Tooltip("low:Q", title="from", format=".3g"), alt.Tooltip("high:Q", title="to", format=".3g")]
    tips += [alt.Tooltip("tokens:Q", format=",.0f"), alt.Tooltip("share:Q", format=".2%")]
    stroke = {"stroke": colour("page"), "strokeWidth": 1} if len(rows) <= 80 else {}
    layers = [
        alt.Chart(data(rows))
        .mark_rect(color=colour("h3"), **stroke)
        .encode(x=x, x2="high:Q", y=y, y2=alt.Y2Datum(0), tooltip=tips)
    ]
    for value, line in marks:
        rule = alt.Chart(data([{"low": value}])).mark_rule(
            color=colour("ink"), strokeWidth=2, strokeDash=dict(DASHES)[line]
        )
        layers.append(rule.encode(x="low:Q"))
    return alt.layer(*layers)


def _positive(edges: list[float]) -> list[float]:
    """The first bin may begin at 0, or below it by rounding, which a logarithm cannot show: it gets the width of the
    second bin."""
    found = list(edges)
    for index in range(len(found) - 2, -1, -1):
        if found[index] <= 0:
            ratio = found[index + 2] / found[index + 1] if index + 2 < len(found) else 2
            found[index] = found[index + 1] / ratio
    return found


def _occupied(counts: list[float]) -> tuple[int, int]:
    """First and last bin that hold a token."""
    held = [index for index, value in enumerate(counts) if value > 0]
    return held[0], held[-1]


def _alt(metrics: Document, rows: list[dict[str, float]]) -> str:
    tallest = max(rows, key=lambda row: row["share"])
    marks = ", ".join(f"{words} {significant(number(metrics, key))}" for key, words, _ in MARKS)
    return (
        f"Histogram of KL per token on a logarithmic scale: {marks} nats. Most tokens lie near "
        f"{significant(tallest['low'], 2)} nats ({percent(tallest['share'], 1)} in the tallest bin)."
    )
