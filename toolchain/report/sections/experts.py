"""Which experts the calibration text reached: a heat map of layers and experts."""

from __future__ import annotations

import re
from typing import Any

from toolchain.report.blocks import Block, Cell, Column, Facts, Paragraph, Section, Table, missing, table
from toolchain.report.documents import Document, number, numbers, part, text
from toolchain.report.figures import Figure, Key, draw
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import NOTHING, count, percent, significant
from toolchain.report.palette import RAMP, colour

MAX_COLUMNS = 256
"""Experts that get a column each; of more, neighbours share one."""
STEPS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Ends of the colours, in even shares: 1 is what each expert would get if all got the same."""
LABELS = ("below 0.1", "0.1 to 0.25", "0.25 to 0.5", "0.5 to 1", "1 to 2", "2 to 4", "4 and more")
LAYER = re.compile(r"\blayers?\.(\d+)\b")
WORST = 10
"""Experts that are listed by name."""


def section(files: EngineFiles) -> Section:
    title = "Expert coverage in calibration"
    layers = tokens_of(files)
    if not layers:
        if not is_moe(files.plan):
            words = "This model has no routed experts."
            return Section(
                id="experts", short="Coverage", title=title, blocks=(Paragraph(text=words, tone="missing"),)
            )
        remedy = (
            "coverage.json is not beside the checkpoint; `toolchain quantize` writes it when calibration runs"
        )
        return Section(id="experts", short="Coverage", title=title, blocks=(missing("Coverage was", remedy),))
    blocks: list[Block] = [
        Facts(items=_facts(files, layers)),
        heat_map(layers, _minimum(files)),
        _least(layers),
    ]
    return Section(id="experts", short="Coverage", title=title, blocks=tuple(blocks))


def is_moe(plan: Document) -> bool:
    assignments = plan.get("assignments")
    return not isinstance(assignments, list) or any(
        isinstance(item, dict) and item.get("role") == "routed_expert" for item in assignments
    )


def tokens_of(files: EngineFiles) -> dict[int, list[float]]:
    """Layer -> routed tokens of each expert, from coverage.json or, for older checkpoints, quantize.json."""
    found = {}
    layers = part(files.coverage, "layers") or part(files.quantize, "coverage")
    for path, value in layers.items():
        layer = LAYER.search(path)
        tokens = numbers(value if isinstance(value, list) else part(layers, path).get("tokens"))
        if layer and tokens:
            found[int(layer[1])] = tokens
    return dict(sorted(found.items()))


def _minimum(files: EngineFiles) -> float:
    """Tokens below which an expert counts as starved."""
    return max(number(files.coverage, "min_tokens_per_expert") or 0, 1)


def _starved_words(minimum: float) -> str:
    return "no token" if minimum == 1 else f"fewer than {count(minimum)} tokens"


def _facts(files: EngineFiles, layers: dict[int, list[float]]) -> tuple[tuple[str, str], ...]:
    coverage = files.coverage or part(files.quantize, "calibration")
    starved = sum(value < _minimum(files) for tokens in layers.values() for value in tokens)
    everyone = sum(map(len, layers.values()))
    samples, length = number(coverage, "samples"), number(coverage, "length_tokens")
    least, most = (choose(map(choose, layers.values())) for choose in (min, max))
    remedy = files.coverage.get("remedy") or files.quantize.get("starved_remedy")
    found = [
        ("Calibration", f"{count(samples)} samples of {count(length)} tokens" if samples else ""),
        (
            "Experts see",
            {"routed": "tokens the router sends", "all": "every token"}.get(
                text(coverage, "mode"), text(coverage, "mode")
            ),
        ),
        ("Tokens per expert", f"{count(least)} to {count(most)}"),
        ("Variation over experts (cv)", significant(number(coverage, "cv"))),
        (
            "Starved experts",
            f"{starved or 'none'} of {count(everyone)} ({_starved_words(_minimum(files))})",
        ),
        ("Remedy", remedy if isinstance(remedy, str) else ""),
    ]
    return tuple((name, value) for name, value in found if value and value != NOTHING)


def heat_map(layers: dict[int, list[float]], minimum: float) -> Figure:
    """One rectangle per expert; above MAX_COLUMNS experts one per group of neighbours, and the note says so."""
    experts = max(map(len, layers.values()))
    together = -(-experts // MAX_COLUMNS)
    rows: list[dict[str, Any]] = [
        {"layer": layer, "tokens": _grouped(tokens, together, minimum)} for layer, tokens in layers.items()
    ]
    columns = max(len(row["tokens"]) for row in rows)
    keys = [Key(label=f"starved ({_starved_words(minimum)})", colour=colour("bad"))]
    keys += [Key(label=label, colour=shade) for label, shade in zip(LABELS, _colours()[1:], strict=True)]
    note = f"A column is the mean of {together} of the {experts} experts, or starved where one of them is."
    return draw(
        _cells(rows, columns, together, minimum),
        id="coverage",
        title="Calibration tokens of each expert, in multiples of an even share",
        alt=_alt(layers, minimum),
        keys=tuple(keys),
        note=note if together > 1 else "",
        height=min(max(480 // len(rows), 4), 22) * len(rows),
        width=columns * max(640 // columns, 2),
    )


def _cells(rows: list[dict[str, Any]], columns: int, together: int, minimum: float) -> Any:
    from toolchain.report.charts import alt, axis_of

    axis = axis_of(columns) if together == 1 else alt.Axis(labels=False, ticks=False, domain=False)
    gap = {"stroke": colour("page"), "strokeWidth": 1} if columns <= 64 else {}
    what = "expert" if together == 1 else f"group of {together} experts"
    scale = alt.Scale(type="threshold", domain=[0, *STEPS], range=_colours())
    tips = [
        alt.Tooltip("layer:O"),
        alt.Tooltip("expert:O", title=what),
        alt.Tooltip("tokens:Q", format=",.0f"),
    ]
    return (
        alt.Chart(alt.InlineData(values=rows))
        .transform_flatten(["tokens"])
        .transform_window(number="row_number()", groupby=["layer"])
        .transform_joinaggregate(mean="mean(tokens)", groupby=["layer"])
        .transform_calculate(
            expert="datum.number - 1",
            share=f"datum.tokens < {minimum} ? -1 : datum.mean > 0 ? datum.tokens / datum.mean : 0",
            shown="datum.mean > 0 ? format(datum.tokens / datum.mean, '.3~g') : '0'",
        )
        .mark_rect(**gap)
        .encode(
            x=alt.X("expert:O", title=what, axis=axis),
            y=alt.Y("layer:O", title="layer", axis=_layer_axis([row["layer"] for row in rows])),
            color=alt.Color("share:Q", legend=None, scale=scale),
            tooltip=[*tips, alt.Tooltip("shown:N", title="times an even share")],
        )
    )


def _colours() -> list[str]:
    return [colour("bad"), *(colour(name) for name in RAMP)]


def _grouped(tokens: list[float], together: int, minimum: float) -> list[float]:
    """Means of neighbours; the smallest of those among which one is starved."""
    if together == 1:
        return tokens
    groups = [tokens[start : start + together] for start in range(0, len(tokens), together)]
    return [min(group) if min(group) < minimum else round(sum(group) / len(group), 1) for group in groups]


def _layer_axis(layers: list[int]) -> Any:
    from toolchain.report.charts import alt

    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 500) if len(layers) <= 24 * step)
    return alt.Axis(ticks=False, domain=False, values=layers[::step])


def _alt(layers: dict[int, list[float]], minimum: float) -> str:
    experts = max(map(len, layers.values()))
    layer, expert, tokens = _ranked(layers)[0]
    starved = sum(value < minimum for tokens in layers.values() for value in tokens)
    return (
        f"Heat map of {len(layers)} layers by {experts} experts. The least used expert, {expert} of layer {layer}, saw "
        f"{count(tokens)} tokens; {starved} experts are starved ({_starved_words(minimum)})."
    )


def _ranked(layers: dict[int, list[float]]) -> list[tuple[int, int, float]]:
    """(layer, expert, tokens), the fewest tokens first."""
    every = [
        (layer, expert, value) for layer, tokens in layers.items() for expert, value in enumerate(tokens)
    ]
    return sorted(every, key=lambda item: (item[2], item[0], item[1]))


def _least(layers: dict[int, list[float]]) -> Table:
    rows: list[list[Cell | str]] = []
    for layer, expert, tokens in _ranked(layers)[:WORST]:
        whole = sum(layers[layer])
        share = tokens / whole if whole else 0.0
        rows.append(
            [
                Cell(text=str(layer), value=layer),
                Cell(text=str(expert), value=expert),
                Cell(text=count(tokens), value=tokens),
                Cell(text=percent(share, 3), value=share),
                Cell(text=significant(share * len(layers[layer]), 2), value=share * len(layers[layer])),
            ]
        )
    names = ("Layer", "Expert", "Tokens", "Share of its layer", "Times an even share")
    return table(
        f"The {len(rows)} least used experts", [Column(title=name, numeric=True) for name in names], rows
    )
