"""What each layer group costs when only it is quantized: sensitivity.json, or the scores of a format search."""

from __future__ import annotations

from typing import Any

from toolchain.report.blocks import Block, Cell, Column, Facts, Fold, Section, missing, table
from toolchain.report.documents import Document, number, part, parts, text
from toolchain.report.figures import Figure, Key, draw
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import count, significant
from toolchain.report.palette import categories
from toolchain.report.sections.formats import ROLES, SOURCE

SHOWN = 15
"""Groups in the table that is always open."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


def section(files: EngineFiles) -> Section:
    title = "Sensitivity"
    document = files.sensitivity or _of_search(files.auto)
    scores = [item for item in parts(document, "scores") if number(item, "kl") is not None]
    if not scores:
        source = text(files.plan, "model") or "MODEL"
        remedy = f"run `toolchain sensitivity {source} --format F --output {files.where}/sensitivity.json`"
        return Section(id="sensitivity", title=title, blocks=(missing("Sensitivity was", remedy),))
    scores.sort(key=lambda item: (-(number(item, "kl") or 0), text(item, "group")))
    blocks: list[Block] = [Facts(items=_facts(document))]
    if (figure := _figure(scores)) is not None:
        blocks.append(figure)
    blocks.append(
        _table(scores[:SHOWN], f"The {min(SHOWN, len(scores))} most sensitive of {len(scores)} layer groups")
    )
    if len(scores) > SHOWN:
        blocks.append(
            Fold(summary=f"All {len(scores)} layer groups", blocks=(_table(scores, "All layer groups"),))
        )
    return Section(id="sensitivity", title=title, blocks=tuple(blocks))


def _of_search(auto: Document) -> Document:
    """The scores of `--format auto` in the form of sensitivity.json, where they are the same measurement: KL of one
    group at a time. Names of groups begin with layer and role: ``3.attention.q_proj+k_proj``."""
    if text(auto, "method") != "sensitivity":
        return {}
    scores = []
    for item in parts(auto, "scores"):
        layer, _, rest = text(item, "group").partition(".")
        if text(item, "format") != SOURCE:
            place = {"layer": int(layer) if layer.isdecimal() else None, "role": rest.partition(".")[0]}
            scores.append({**item, **place, "kl": item.get("score")})
    return {"scores": scores, "held_out": part(auto, "held_out", "scores")}


def _facts(document: Document) -> tuple[tuple[str, str], ...]:
    held = part(document, "held_out")
    found = [
        ("Measured", "mean KL(source || quantized) when one layer group alone is quantized"),
        (
            "Held-out text",
            f"{count(number(held, 'windows'))} windows of {count(number(held, 'length_tokens'))} tokens",
        ),
        ("Policy", text(document, "policy")),
    ]
    return tuple((name, value) for name, value in found if value)


def _figure(scores: list[Document]) -> Figure | None:
    """KL by layer on a log scale, one colour and shape per role and format. None when no group has a layer."""
    rows = [
        _row(item) for item in scores if number(item, "layer") is not None and (number(item, "kl") or 0) > 0
    ]
    if not rows:
        return None
    names = sorted({row["what"] for row in rows})
    keys = tuple(
        Key(label=name, colour=tint) for name, tint in zip(names, categories(len(names)), strict=True)
    )
    worst = scores[0]
    return draw(
        _points(rows, names),
        id="sensitivity-chart",
        title="KL when only this part of this layer is quantized",
        alt=f"Points by layer for {', '.join(names)}. The most sensitive is {text(worst, 'group')} in "
        f"{text(worst, 'format')} with {significant(number(worst, 'kl'))} nats.",
        keys=keys,
        note="Logarithmic scale. Bars: two standard errors to each side.",
        height=260,
    )


def _points(rows: list[dict[str, Any]], names: list[str]) -> Any:
    from toolchain.report.charts import alt, data, layer_axis, log_scale

    layers = max(row["layer"] for row in rows) + 1
    x = alt.X(
        "layer:Q",
        title="layer",
        axis=layer_axis(layers),
        scale=alt.Scale(domain=[-0.5, layers - 0.5], nice=False),
    )
    shade = alt.Color("what:N", scale=alt.Scale(domain=names, range=categories(len(names))), legend=None)
    shapes = [SHAPES[index % len(SHAPES)] for index in range(len(names))]
    base = alt.Chart(data(rows)).encode(x=x, color=shade)
    y_scale, y_axis = log_scale([row["low"] for row in rows], [row["high"] for row in rows])
    tips = [
        alt.Tooltip("group:N"),
        alt.Tooltip("format:N"),
        alt.Tooltip("kl:Q", title="KL (nats)", format=".3g"),
    ]
    points = base.mark_point(size=46, filled=True, opacity=0.9).encode(
        y=alt.Y("kl:Q", title="KL (nats)", scale=y_scale, axis=y_axis),
        shape=alt.Shape("what:N", scale=alt.Scale(domain=names, range=shapes), legend=None),
        tooltip=tips,
    )
    bars = base.mark_rule(opacity=0.5).encode(y=alt.Y("low:Q", scale=y_scale, axis=y_axis), y2="high:Q")
    return alt.layer(bars, points)


def _row(item: Document) -> dict[str, Any]:
    kl, error = number(item, "kl") or 0.0, number(item, "kl_stderr") or 0.0
    role = ROLES.get(text(item, "role"), text(item, "role"))
    return {
        "layer": int(number(item, "layer") or 0),
        "group": text(item, "group"),
        "format": text(item, "format"),
        "what": f"{role}, {text(item, 'format')}",
        "kl": kl,
        "low": max(kl - 2 * error, kl / 10),
        "high": kl + 2 * error,
    }


def _table(scores: list[Document], caption: str) -> Any:
    rows: list[list[Cell | str]] = []
    for item in scores:
        kl, error, saved, price = (
            number(item, key) for key in ("kl", "kl_stderr", "bits_saved", "kl_per_bit")
        )
        rows.append(
            [
                text(item, "group"),
                text(item, "format"),
                Cell(text=significant(kl), value=kl),
                Cell(text=significant(error, 2), value=error),
                Cell(text=significant(saved), value=saved),
                Cell(text=significant(price), value=price),
            ]
        )
    columns = [
        Column(title="Layer and part"),
        Column(title="Format"),
        Column(title="KL (nats)", numeric=True),
    ]
    columns += [Column(title="Standard error", numeric=True)]
    columns += [Column(title="Bits saved", numeric=True), Column(title="KL per bit", numeric=True)]
    return table(caption, columns, rows)
