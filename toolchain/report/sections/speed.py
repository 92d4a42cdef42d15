"""Benchmarks of the served engine."""

from __future__ import annotations

from toolchain.report.blocks import (
    Block,
    Cell,
    Column,
    Facts,
    Fold,
    Paragraph,
    Section,
    Table,
    missing,
    table,
)
from toolchain.report.documents import Document, number, part, parts, text, texts
from toolchain.report.figures import Figure, draw
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import count, significant
from toolchain.report.trade_off import Served, alike, served, trade_off

TIMES = {"ttft_ms": "TTFT", "itl_ms": "ITL", "e2e_ms": "End to end"}
QUANTILES = ("p50", "p90", "p99")


def section(files: EngineFiles) -> Section:
    title = "Latency and throughput"
    if not files.benches:
        remedy = f"run `toolchain bench {files.where}`"
        return Section(id="speed", short="Speed", title=title, blocks=(missing("Speed was", remedy),))
    name, latest = files.benches[-1]
    blocks: list[Block] = [
        Facts(items=settings_facts(latest)),
        *_stale(files, latest),
        levels_table(latest, name),
    ]
    if (figure := _figure(latest)) is not None:
        blocks.append(figure)
    blocks += trade_off(_served(files, latest))
    if earlier := files.benches[-2::-1]:
        older = tuple(levels_table(document, file) for file, document in earlier)
        blocks.append(
            Fold(summary=f"{len(older)} earlier benchmark{'s' if len(older) > 1 else ''}", blocks=older)
        )
    return Section(id="speed", short="Speed", title=title, blocks=tuple(blocks))


def _served(files: EngineFiles, latest: Document) -> list[Served]:
    """The newest benchmark, and that of the source model where it was measured alike."""
    points = served(latest, files.name)
    if files.source_benches and alike([latest, files.source_benches[-1][1]]):
        points += served(files.source_benches[-1][1], "source model")
    return points


def settings_facts(bench: Document) -> tuple[tuple[str, str], ...]:
    settings, environment = part(bench, "settings"), part(bench, "environment")
    gpu = ", ".join(texts(environment.get("gpus"))) or "no GPU"
    server = part(environment, "server")
    load = f"{text(bench, 'load')}; prompts of {text(settings, 'prompt_tokens')}, answers of "
    found = [
        ("Measured", text(bench, "created")),
        ("Load", f"{load}{text(settings, 'output_tokens')} tokens, seed {text(settings, 'seed')}"),
        ("Machine", f"{text(environment, 'cpu')}, {text(environment, 'cpu_cores')} cores; {gpu}"),
        ("Server", f"{text(server, 'name')} {text(server, 'version')}".strip()),
    ]
    return tuple((name, value) for name, value in found if value)


def _stale(files: EngineFiles, bench: Document) -> list[Block]:
    measured = text(part(bench, "environment", "engine"), "manifest_sha256")
    if not measured or files.manifest_sha256 in (None, measured):
        return []
    words = "This benchmark was measured on an earlier build of the engine: engine.json has changed since."
    return [Paragraph(text=words, tone="warning")]


def levels_table(bench: Document, name: str) -> Table:
    rows: list[list[Cell | str]] = []
    for level in parts(bench, "levels"):
        errors = number(level, "errors")
        cells: list[Cell | str] = [
            Cell(text=count(number(level, key)), value=number(level, key))
            for key in ("concurrency", "requests")
        ]
        cells.append(Cell(text=count(errors), value=errors, tone="bad" if errors else ""))
        for key in ("output_tokens_per_s", "requests_per_s"):
            cells.append(Cell(text=significant(number(level, key)), value=number(level, key)))
        for key in TIMES:
            p50, p90, p99 = (number(part(level, key), quantile) for quantile in QUANTILES)
            detail = f"p90 {significant(p90)}, p99 {significant(p99)}" if p90 is not None else ""
            cells.append(Cell(text=significant(p50), value=p50, detail=detail))
        rows.append(cells)
    names = ["Users", "Requests", "Errors", "Tokens/s", "Requests/s"]
    names += [f"{words} p50 (ms)" for words in TIMES.values()]
    return table(f"bench/{name}", [Column(title=title, numeric=True) for title in names], rows)


def _figure(bench: Document) -> Figure | None:
    """Throughput against the number of users; None for a single measurement, of which the table says all."""
    from toolchain.report.charts import alt, data
    from toolchain.report.palette import colour

    rows = [
        {"users": users, "rate": rate}
        for level in parts(bench, "levels")
        if (users := number(level, "concurrency"))
        and (rate := number(level, "output_tokens_per_s")) is not None
    ]
    if len(rows) < 2:
        return None
    ticks = sorted(row["users"] for row in rows)
    chart = (
        alt.Chart(data(rows))
        .mark_line(color=colour("c1"), point=alt.OverlayMarkDef(color=colour("c1"), filled=True, size=46))
        .encode(
            x=alt.X(
                "users:Q",
                title="users at once",
                scale=alt.Scale(type="log", base=2),
                axis=alt.Axis(values=ticks, grid=False),
            ),
            y=alt.Y("rate:Q", title="output tokens/s", axis=alt.Axis(tickCount=5)),
            tooltip=[
                alt.Tooltip("users:Q", title="users"),
                alt.Tooltip("rate:Q", title="tokens/s", format=",.3~s"),
            ],
        )
    )
    words = "; ".join(f"{count(row['users'])} users {significant(row['rate'])} tokens/s" for row in rows)
    return draw(chart, id="throughput", title="Output tokens per second", alt=f"Line: {words}.", height=180)
