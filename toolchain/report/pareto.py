"""Size against quality: bits per parameter against KL, with the engines that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.report.blocks import Block, Paragraph
from toolchain.report.figures import Key, draw
from toolchain.report.numbers import significant
from toolchain.report.palette import categories, colour
from toolchain.report.sections.sensitivity import SHAPES


@dataclass(frozen=True, kw_only=True)
class Point:
    name: str
    bits: float
    kl: float
    interval: tuple[float, float] | None
    group: str
    """Only points of one group compare."""


def front(points: Sequence[Point]) -> set[str]:
    """Names of the points that no other of their group beats: one that is as small and as good, and better in one."""
    return {
        point.name
        for point in points
        if not any(
            other.group == point.group
            and other.bits <= point.bits
            and other.kl <= point.kl
            and (other.bits < point.bits or other.kl < point.kl)
            for other in points
        )
    }


def pareto(points: Sequence[Point]) -> tuple[Block, ...]:
    """The plot, or one line where fewer than two engines have both figures."""
    drawn = [point for point in points if point.kl > 0]
    if len(drawn) < 2:
        words = "Not drawn: fewer than two engines have a size and a KL above 0; `toolchain evaluate` measures it."
        return (Paragraph(text=words, tone="missing"),)
    best = front(points)
    letters = sorted({point.group for point in drawn})
    shades = categories(len(letters))
    keys = [
        Key(label="engines" if len(letters) == 1 else f"measured alike: {letter}", colour=shade)
        for letter, shade in zip(letters, shades, strict=True)
    ]
    keys.append(Key(label="front: no other is smaller and better", colour=colour("soft"), style="dashed"))
    words = "; ".join(
        f"{point.name}: {point.bits:.2f} bits, {significant(point.kl)} nats"
        + (", on the front" if point.name in best else "")
        for point in drawn
    )
    figure = draw(
        _chart(drawn, best, letters),
        id="pareto-chart",
        title="Mean KL against effective bits per parameter, 95 % intervals",
        alt=f"Points: {words}.",
        keys=tuple(keys),
        note="Logarithmic in KL; down and to the left is better. Filled: on the front. Where intervals overlap, the "
        "order is not certain.",
        height=320,
    )
    return (figure,)


def _chart(points: Sequence[Point], best: set[str], letters: list[str]) -> Any:
    from toolchain.report.charts import alt, data, log_scale

    rows = [
        _row(point, best) for point in sorted(points, key=lambda point: (point.group, point.bits, point.kl))
    ]
    scale, axis = log_scale([row["low"] for row in rows], [row["high"] for row in rows])
    spread = max(row["bits"] for row in rows) - min(row["bits"] for row in rows)
    margin = max(0.12 * spread, 0.25)
    domain = [min(row["bits"] for row in rows) - margin, max(row["bits"] for row in rows) + margin]
    middle = sum(domain) / 2
    x = alt.X(
        "bits:Q",
        title="effective bits per parameter",
        scale=alt.Scale(domain=domain, nice=False, zero=False),
        axis=alt.Axis(grid=False, tickCount=8),
    )
    y = alt.Y("kl:Q", title="mean KL (nats per token)", scale=scale, axis=axis)
    ends = alt.Y("low:Q", scale=scale, axis=axis, title="mean KL (nats per token)")
    line = alt.Chart(data([row for row in rows if row["front"]])).mark_line(
        color=colour("soft"), strokeDash=[7, 4], strokeWidth=1.5, interpolate="step-after"
    )
    return alt.layer(
        line.encode(x=x, y=y, detail="group:N"),
        *_marks(alt.Chart(data(rows)).encode(x=x, color=_shade(letters)), y, ends, letters),
        *(
            alt.Chart(data([row for row in rows if (row["bits"] > middle) == right]))
            .mark_text(align="right" if right else "left", dx=-9 if right else 9, dy=-11)
            .encode(x=x, y=y, text="name:N")
            for right in (False, True)
        ),
    )


def _shade(letters: list[str]) -> Any:
    from toolchain.report.charts import alt

    return alt.Color("group:N", legend=None, scale=alt.Scale(domain=letters, range=categories(len(letters))))


def _marks(base: Any, y: Any, ends: Any, letters: list[str]) -> tuple[Any, ...]:
    """Intervals, hollow points, and filled ones on the front; a shape for each letter."""
    from toolchain.report.charts import alt

    shapes = [SHAPES[index % len(SHAPES)] for index in range(len(letters))]
    shape = alt.Shape("group:N", legend=None, scale=alt.Scale(domain=letters, range=shapes))
    tips = [alt.Tooltip("name:N", title="engine"), alt.Tooltip("bits:Q", format=".3f")]
    tips.append(alt.Tooltip("text:N", title="KL"))
    hollow, filled = (base.transform_filter(f"{'' if on else '!'}datum.front") for on in (False, True))
    return (
        base.mark_rule(strokeWidth=1.5).encode(y=ends, y2="high:Q"),
        hollow.mark_point(size=90, filled=False, strokeWidth=2, fill=colour("page")).encode(
            y=y, shape=shape, tooltip=tips
        ),
        filled.mark_point(size=100, filled=True, opacity=1).encode(y=y, shape=shape, tooltip=tips),
    )


def _row(point: Point, best: set[str]) -> dict[str, Any]:
    low, high = point.interval or (point.kl, point.kl)
    interval = f" ({significant(low)} to {significant(high)})" if point.interval else ""
    return {
        "name": point.name,
        "bits": point.bits,
        "kl": point.kl,
        "low": max(low, point.kl / 100),
        "high": high,
        "group": point.group,
        "front": point.name in best,
        "text": significant(point.kl) + interval,
    }
