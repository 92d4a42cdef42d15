"""Speed of one user against throughput of one GPU: what a benchmark at several loads shows of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.report.blocks import Block, Cell, Column, Table, table
from toolchain.report.documents import Document, number, part, parts, text
from toolchain.report.figures import Figure, Key, draw
from toolchain.report.numbers import count, significant
from toolchain.report.palette import CATEGORIES, categories, colour
from toolchain.report.sections.sensitivity import SHAPES

USER = "tokens/s per user"
GPU, MACHINE = "tokens/s per GPU", "tokens/s of the machine (no GPU)"


@dataclass(frozen=True, kw_only=True)
class Served:
    """One load of one engine."""

    series: str
    load: str
    """``4 users`` or ``2 requests/s``."""
    size: float
    """Users or requests per second: the order of a line's points."""
    user: float
    """Tokens per second that a user sees after the first token: the median over requests."""
    rate: float
    """Tokens per second per GPU, or of a machine without."""
    per_gpu: bool


def served(bench: Document, series: str) -> list[Served]:
    """The loads of a result of ``toolchain bench`` that have both figures."""
    gpus = part(bench, "environment").get("gpus")
    found = []
    for level in parts(bench, "levels"):
        user, each = _user(level), number(level, "output_tokens_per_s_per_gpu")
        rate = number(level, "output_tokens_per_s") if each is None and gpus == [] else each
        users, per_s = number(level, "concurrency"), number(level, "rate")
        size = users if users is not None else per_s
        if user and rate and size is not None:
            words = (
                f"{count(users)} user{'' if users == 1 else 's'}"
                if users is not None
                else f"{size:g} requests/s"
            )
            found.append(
                Served(series=series, load=words, size=size, user=user, rate=rate, per_gpu=each is not None)
            )
    return sorted(found, key=lambda point: point.size)


def _user(level: Document) -> float | None:
    """Results of the first schema have the time per token alone."""
    median = number(part(level, "user_tokens_per_s"), "p50")
    if median is not None:
        return median
    each = number(part(level, "tpot_ms"), "p50")
    return 1000 / each if each and each > 0 else None


def alike(benches: Sequence[Document]) -> bool:
    """Whether they asked for the same lengths, by the same protocol, on the same machine."""
    conditions = set()
    for bench in benches:
        settings, environment = part(bench, "settings"), part(bench, "environment")
        asked = tuple(text(settings, key) for key in ("prompt_tokens", "output_tokens", "trace"))
        machine = (text(environment, "cpu"), text(environment, "cpu_cores"), str(environment.get("gpus")))
        conditions.add((asked, machine, text(bench, "target") or "triton-grpc"))
    return len(conditions) < 2


def front(points: Sequence[Served]) -> set[Served]:
    """Points that no other beats: one that is as fast for its users and for its GPU, and faster in one."""
    return {
        point
        for point in points
        if not any(
            other.user >= point.user
            and other.rate >= point.rate
            and (other.user > point.user or other.rate > point.rate)
            for other in points
        )
    }


def trade_off(points: Sequence[Served]) -> tuple[Block, ...]:
    """The plot with its table; nothing for fewer than two points. Where some are per GPU, only those are comparable."""
    per_gpu = any(point.per_gpu for point in points)
    drawn = [point for point in points if point.per_gpu == per_gpu]
    names = list(dict.fromkeys(point.series for point in drawn))
    shown = names[: len(CATEGORIES)]
    drawn = [point for point in drawn if point.series in shown]
    if len(drawn) < 2:
        return ()
    best, other = front(drawn), GPU if per_gpu else MACHINE
    left = len({point.series for point in points}) - len(shown)
    return (_figure(drawn, best, shown, other, left), _table(drawn, best, other))


def _figure(drawn: list[Served], best: set[Served], names: list[str], other: str, left: int) -> Figure:
    keys = [Key(label=name, colour=shade) for name, shade in zip(names, categories(len(names)), strict=True)]
    words = "; ".join(
        f"{point.series} with {point.load}: {significant(point.user)} and {significant(point.rate)}"
        + (", on the front" if point in best else "")
        for point in drawn
    )
    note = "Up and to the right is better. Filled: no other point is faster for both."
    if left:
        note += f" Not drawn: {left} more, beyond the sixth or without a figure per GPU."
    return draw(
        _chart(drawn, best, names, other),
        id="trade-off",
        title=f"What a user gets against what the hardware gives: {USER}, {other}",
        alt=f"Points: {words}.",
        keys=tuple(keys),
        note=note,
        height=300,
    )


def _chart(drawn: list[Served], best: set[Served], names: list[str], other: str) -> Any:
    from toolchain.report.charts import alt, data

    rows = [
        {
            "series": point.series,
            "load": point.load,
            "order": point.size,
            "user": point.user,
            "rate": point.rate,
            "front": point in best,
        }
        for point in drawn
    ]
    domain = [0, max(point.user for point in drawn) * 1.15]
    x = alt.X("user:Q", title=USER, scale=alt.Scale(domain=domain, nice=False), axis=alt.Axis(tickCount=8))
    y = alt.Y("rate:Q", title=other, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=6))
    shades = alt.Scale(domain=names, range=categories(len(names)))
    shapes = alt.Scale(domain=names, range=[SHAPES[index % len(SHAPES)] for index in range(len(names))])
    base = alt.Chart(data(rows)).encode(x=x, y=y, color=alt.Color("series:N", legend=None, scale=shades))
    tips = [alt.Tooltip("series:N", title="engine"), alt.Tooltip("load:N", title="load")]
    tips += [
        alt.Tooltip("user:Q", title=USER, format=",.3~s"),
        alt.Tooltip("rate:Q", title=other, format=",.3~s"),
    ]
    shape = alt.Shape("series:N", legend=None, scale=shapes)
    looks: dict[bool, dict[str, Any]] = {
        False: {"size": 80, "filled": False, "strokeWidth": 2, "fill": colour("page")},
        True: {"size": 90, "filled": True, "opacity": 1},
    }
    points = [
        base.transform_filter(f"{'' if on else '!'}datum.front")
        .mark_point(**look)
        .encode(shape=shape, tooltip=tips)
        for on, look in looks.items()
        if any(row["front"] is on for row in rows)  # Vega warns of a layer without a row
    ]
    return alt.layer(
        base.mark_line(strokeWidth=1.5).encode(order="order:Q"),
        *points,
        alt.Chart(data(rows)).mark_text(align="left", dx=8, dy=-8).encode(x=x, y=y, text="load:N"),
    )


def _table(drawn: list[Served], best: set[Served], other: str) -> Table:
    rows: list[list[Cell | str]] = [
        [
            point.series,
            Cell(text=point.load, value=point.size),
            Cell(text=significant(point.user), value=point.user),
            Cell(text=significant(point.rate), value=point.rate),
            "on the front" if point in best else "",
        ]
        for point in drawn
    ]
    columns = [Column(title="Engine"), Column(title="Load"), Column(title=USER.capitalize(), numeric=True)]
    columns += [Column(title=other[0].upper() + other[1:], numeric=True), Column(title="Front")]
    return table("Speed for users and use of the hardware at each load", columns, rows)
