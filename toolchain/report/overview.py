"""The tables and lines of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from toolchain.report.blocks import Block, Cell, Column, Paragraph, Section, Table, missing, table
from toolchain.report.documents import Document, interval, number, part, parts, text
from toolchain.report.figures import Figure, Key, draw
from toolchain.report.identity import Identity
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import NOTHING, between, count, percent, signed_percent, significant, size
from toolchain.report.palette import CATEGORIES, categories
from toolchain.report.sections.layer_error import measured_layers
from toolchain.report.sections.speed import TIMES
from toolchain.report.sections.summary import effective_bits
from toolchain.report.trade_off import alike, served, trade_off
from toolchain.report.verdict import increase_of, judge


def overview(
    engines: Sequence[EngineFiles], names: Sequence[str], groups: Sequence[Identity | None]
) -> Table:
    """One row per engine. The letter of its data stands beside its figures when there is more than one."""
    several = len({group.letter for group in groups if group}) > 1
    rows: list[list[Cell | str]] = []
    for engine, name, group in zip(engines, names, groups, strict=True):
        letter: list[Cell | str] = [group.letter if group else NOTHING] if several else []
        rows.append([name, _verdict(engine), *letter, *_figures(engine), *_speed(engine)])
    columns = [Column(title="Engine"), Column(title="Verdict"), *([Column(title="Alike")] if several else [])]
    columns.append(Column(title="Format"))
    numeric = ("Bits", "Weights", "Mean KL (nats)", "Perplexity", "Top-1", "Router")
    columns += [Column(title=title, numeric=True) for title in (*numeric, "Tokens/s", "TTFT p50 (ms)")]
    return table("Engines, with 95 % intervals below their figures", columns, rows)


def _figures(engine: EngineFiles) -> list[Cell | str]:
    metrics, bits = engine.metrics, effective_bits(engine)
    written = number(part(engine.audit, "facts"), "bytes") or number(engine.quantize, "tensor_bytes")
    kl, top1, router = (number(metrics, key) for key in ("kl_mean", "top1_agreement", "router_agreement"))
    ppl, increase = number(metrics, "ppl"), increase_of(metrics)
    return [
        text(engine.plan, "format") or text(engine.manifest, "format") or NOTHING,
        Cell(text=NOTHING if bits is None else f"{bits:.2f}", value=bits),
        Cell(text=size(written), value=written),
        Cell(text=significant(kl), value=kl, detail=_ends(metrics, "kl_mean")),
        Cell(
            text=significant(ppl, 4), value=ppl, detail="" if increase is None else signed_percent(increase)
        ),
        Cell(text=percent(top1), value=top1, detail=_ends(metrics, "top1_agreement", percent)),
        Cell(text=percent(router), value=router),
    ]


def _ends(metrics: Document, key: str, show: Callable[[float], str] = significant) -> str:
    return between(interval(metrics, key), show).partition(": ")[2]


def _speed(engine: EngineFiles) -> list[Cell | str]:
    """Throughput of the level with most users of the newest benchmark, and TTFT of the one with fewest."""
    levels = parts(engine.benches[-1][1], "levels") if engine.benches else []
    if not levels:
        return [Cell(text=NOTHING), Cell(text=NOTHING)]
    levels = sorted(levels, key=lambda level: number(level, "concurrency") or 0)
    rate, ttft = number(levels[-1], "output_tokens_per_s"), number(part(levels[0], "ttft_ms"), "p50")
    return [
        Cell(text=significant(rate), value=rate, detail=_users(levels[-1])),
        Cell(text=significant(ttft), value=ttft, detail=_users(levels[0])),
    ]


def _users(level: Document) -> str:
    users = number(level, "concurrency")
    return f"{count(users)} user{'' if users == 1 else 's'}"


def _verdict(engine: EngineFiles) -> Cell:
    verdict = judge(engine)
    words = {"fit": "fit", "not fit": "not fit", "open": "no verdict"}[verdict.state]
    return Cell(text=words, value=words, tone={"good": "good", "bad": "bad"}.get(verdict.tone, "muted"))


def layers_section(
    engines: Sequence[EngineFiles], names: Sequence[str], groups: Sequence[Identity | None]
) -> Section:
    """The error of every layer, a line per engine; at most as many engines as there are colours."""
    title = "Error layer by layer"
    rows: list[dict[str, Any]] = []
    shown: list[str] = []
    for engine, name, group in zip(engines, names, groups, strict=True):
        errors = [
            (layer, number(item, "hidden_rms")) for layer, item in measured_layers(engine.metrics).items()
        ]
        found = [{"x": layer, "y": error, "series": name} for layer, error in errors if error is not None]
        if found and group is not None and len(shown) < len(CATEGORIES):
            shown.append(name)
            rows += found
    if not shown:
        remedy = "run `toolchain evaluate ENGINE --baseline MODEL`"
        return Section(
            id="layers",
            title=title,
            short="Layer error",
            blocks=(missing("Errors of the layers were", remedy),),
        )
    figure = _layer_lines(rows, shown, len(names) - len(shown))
    return Section(id="layers", title=title, short="Layer error", blocks=(figure,))


def _layer_lines(rows: list[dict[str, Any]], shown: list[str], left: int) -> Figure:
    """``left``: engines that are not drawn."""
    from toolchain.report.charts import DASHES, lines

    layers = int(max(row["x"] for row in rows)) + 1
    chart = lines(
        rows,
        series=shown,
        x_title="layer",
        y_title="relative RMS error",
        y_format="~%",
        zero=True,
        layers=layers,
    )
    keys = tuple(
        Key(label=name, colour=shade, style=DASHES[index % len(DASHES)][0])
        for index, (name, shade) in enumerate(zip(shown, categories(len(shown)), strict=True))
    )
    last = {str(row["series"]): row["y"] for row in rows}
    words = "; ".join(f"{name} {percent(last[name])}" for name in shown)
    note = (
        f"Not drawn: {left} of {left + len(shown)} engines, not measured or beyond the sixth." if left else ""
    )
    return draw(
        chart,
        id="layer-error",
        title="Relative RMS error of the hidden states after each layer",
        alt=f"Lines; after the last layer: {words}.",
        keys=keys,
        note=note,
    )


def speed_section(engines: Sequence[EngineFiles], names: Sequence[str]) -> Section:
    """All levels of the newest benchmark of each engine, and a warning when they were not run alike."""
    rows: list[list[Cell | str]] = []
    for engine, name in zip(engines, names, strict=True):
        bench = engine.benches[-1][1] if engine.benches else {}
        for level in parts(bench, "levels"):
            rate = number(level, "output_tokens_per_s")
            users = number(level, "concurrency")
            cells: list[Cell | str] = [name, Cell(text=count(users), value=users)]
            cells.append(Cell(text=significant(rate), value=rate))
            for key in TIMES:
                p50 = number(part(level, key), "p50")
                cells.append(Cell(text=significant(p50), value=p50))
            rows.append(cells)
    title = "Latency and throughput"
    if not rows:
        return Section(
            id="speed",
            title=title,
            short="Speed",
            blocks=(missing("Speed was", "run `toolchain bench ENGINE`"),),
        )
    columns = [Column(title="Engine")]
    heads = ["Users", "Tokens/s", *(f"{words} p50 (ms)" for words in TIMES.values())]
    columns += [Column(title=head, numeric=True) for head in heads]
    blocks: list[Block] = [table("Newest benchmark of each engine", columns, rows)]
    newest = [
        (engine.benches[-1][1], name) for engine, name in zip(engines, names, strict=True) if engine.benches
    ]
    if not alike([bench for bench, _ in newest]):
        words = "These benchmarks differ in machine or in lengths of prompts and answers: their figures do not compare."
        blocks.insert(0, Paragraph(text=words, tone="warning"))
    blocks += trade_off([point for bench, name in newest for point in served(bench, name)])
    return Section(id="speed", title=title, short="Speed", blocks=tuple(blocks))
