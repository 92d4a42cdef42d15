"""What was quantized to what: a strip of layers, and the reasons."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from toolchain.report.blocks import Block, Cell, Column, Facts, Paragraph, Section, Table, missing, table
from toolchain.report.documents import Document, number, part, parts, ratio, text, texts
from toolchain.report.figures import Figure, Key, draw
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import count, percent, size
from toolchain.report.palette import categories, colour

ROLES = {
    "routed_expert": "routed experts", "shared_expert": "shared experts", "dense_mlp": "dense MLP",
    "attention": "attention", "router": "router", "norm": "norms", "embedding": "embedding", "lm_head": "lm_head",
    "other": "other",
}  # fmt: skip
"""Roles of a plan in words, in the order in which they are shown."""
SOURCE = "source"


def section(files: EngineFiles) -> Section:
    assignments = parts(files.plan, "assignments")
    title = "What was quantized to what"
    if not assignments:
        remedy = f"{files.where}/plan.json is not there: `toolchain engine` writes it"
        return Section(id="formats", short="Formats", title=title, blocks=(missing("The plan was", remedy),))
    blocks: list[Block] = [Facts(items=_facts(files))]
    figure = strip(assignments)
    if figure is not None:
        blocks.append(figure)
    blocks.append(_table(assignments))
    if auto := part(files.auto, "verdict"):
        words = f"Formats were searched for ({text(files.auto, 'method')}): {text(auto, 'kept')} was kept, "
        blocks.append(Paragraph(text=words + text(auto, "reason") + "."))
    return Section(id="formats", short="Formats", title=title, blocks=tuple(blocks))


def _facts(files: EngineFiles) -> tuple[tuple[str, str], ...]:
    plan, estimates = files.plan, part(files.plan, "estimates")
    parameters, quantized = number(estimates, "parameters"), number(estimates, "quantized_parameters")
    part_of = ratio(quantized, parameters)
    share = "" if part_of is None else f" ({percent(part_of, 1)} quantized)"
    found = [
        ("Model", f"{text(plan, 'model')} ({text(plan, 'architecture')})"),
        ("Format", text(plan, "format")),
        ("Policy", text(plan, "policy")),
        ("Recipe", text(plan, "recipe")),
        ("Sparsity", _sparsity(files)),
        ("KV cache", text(plan, "kv_cache") if text(plan, "kv_cache") != "none" else "not quantized"),
        ("Target", f"{text(plan, 'target')} {text(plan, 'target_version')} on {text(plan, 'gpu')}"),
        ("Parameters", count(parameters) + share),
    ]
    return tuple((name, value) for name, value in found if value)


def _sparsity(files: EngineFiles) -> str:
    """The plan's, and what the audit counted; empty for a dense plan."""
    planned, counted = part(files.plan, "sparsity"), part(files.audit, "facts", "sparsity")
    if not planned:
        return ""
    found = ratio(number(counted, "sparse_groups"), number(counted, "groups"))
    share = (
        "" if found is None else f": {percent(found, 1)} of {count(number(counted, 'groups'))} groups of four"
    )
    return f"{text(planned, 'pattern')} by {text(planned, 'method')}{share}"


def row_name(item: Document) -> str:
    """``attention``, or ``attention: q_proj, k_proj`` where a plan speaks about projections apart."""
    name = ROLES.get(text(item, "role"), text(item, "role"))
    projections = texts(item.get("projections"))
    return f"{name}: {', '.join(projections)}" if projections else name


def format_names(assignments: list[Document]) -> list[str]:
    """Formats in use, those that hold most parameters first; ``source`` last."""
    held: dict[str, float] = defaultdict(float)
    for item in assignments:
        held[text(item, "format")] += number(item, "parameters") or 0
    return sorted(held, key=lambda name: (name == SOURCE, -held[name], name))


def strip(assignments: list[Document]) -> Figure | None:
    """Layers from left to right, parts from top to bottom. None when no part belongs to a layer."""
    from toolchain.report.charts import alt, grid

    layered = [item for item in assignments if number(item, "layer") is not None]
    if not layered:
        return None
    names = format_names(assignments)
    colours = _colours(names)
    layers = int(max(number(item, "layer") or 0 for item in layered)) + 1
    order = sorted({row_name(item) for item in layered}, key=lambda name: (_order(name), name))
    rows: list[dict[str, Any]] = [
        {
            "x": item["layer"],
            "part": row_name(item),
            "format": text(item, "format"),
            "reason": text(item, "reason"),
        }
        for item in layered
    ]
    chart = grid(
        rows,
        columns=layers,
        x_title="layer",
        y=alt.Y("part:N", title=None, sort=order, axis=alt.Axis(labelLimit=190, ticks=False, domain=False)),
        fill=alt.Color("format:N", scale=alt.Scale(domain=names, range=colours), legend=None),
        tooltip=[alt.Tooltip(f"{field}:N", title=name) for field, name in _TIPS],
        gap=layers <= 64,
    )
    words = f"{layers} layers; " + "; ".join(_in_words(order, layered))
    keys = tuple(Key(label=_label(name), colour=shade) for name, shade in zip(names, colours, strict=True))
    return draw(
        chart,
        id="strip",
        title="Format of each part, layer by layer",
        alt=words,
        keys=keys,
        height=max(26 * len(order), 60),
        width=_width(layers),
    )


def _colours(names: list[str]) -> list[str]:
    """Grey for what was left as it was, which stands last."""
    others = categories(len(names) - (SOURCE in names))
    return [*others, colour("none")] if SOURCE in names else others


_TIPS = (("x", "layer"), ("part", "part"), ("format", "format"), ("reason", "why"))


def _order(name: str) -> int:
    roles = list(ROLES.values())
    return roles.index(name.split(":")[0]) if name.split(":")[0] in roles else len(roles)


def _label(name: str) -> str:
    return "source dtype (not quantized)" if name == SOURCE else name


def _width(columns: int) -> int:
    """Whole pixels per column: rectangles of a picture then meet without seams."""
    return columns * max(560 // columns, 2)


def _in_words(order: list[str], layered: list[Document]) -> list[str]:
    found = []
    for name in order:
        counted: dict[str, int] = defaultdict(int)
        for item in layered:
            if row_name(item) == name:
                counted[text(item, "format")] += 1
        found.append(f"{name}: " + ", ".join(f"{_label(key)} in {value}" for key, value in counted.items()))
    return found


def _table(assignments: list[Document]) -> Table:
    grouped: dict[tuple[str, str, str], list[Document]] = defaultdict(list)
    for item in assignments:
        grouped[row_name(item), text(item, "format"), text(item, "reason")].append(item)
    rows: list[list[Cell | str]] = []
    for (name, format_name, reason), items in sorted(
        grouped.items(), key=lambda found: (_order(found[0][0]), found[0])
    ):
        sums = {
            key: sum(number(item, key) or 0 for item in items)
            for key in ("parameters", "source_bytes", "planned_bytes")
        }
        layers = sum(number(item, "layer") is not None for item in items)
        rows.append(
            [
                name,
                Cell(text="source dtype" if format_name == SOURCE else format_name, value=format_name),
                Cell(text=str(layers) if layers else "all", value=layers),
                Cell(text=count(sums["parameters"]), value=sums["parameters"]),
                Cell(text=size(sums["source_bytes"]), value=sums["source_bytes"]),
                Cell(text=size(sums["planned_bytes"]), value=sums["planned_bytes"]),
                Cell(text=reason, value=reason, tone="muted"),
            ]
        )
    columns = [Column(title="Part"), Column(title="Format")]
    columns += [Column(title=name, numeric=True) for name in ("Layers", "Parameters", "Source", "Planned")]
    return table("Parts, formats and reasons", [*columns, Column(title="Why")], rows)
