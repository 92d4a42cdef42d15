"""Size and memory: what was planned against what was written and used."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from toolchain.report.blocks import Block, Cell, Column, Fold, Paragraph, Section, Table, missing, table
from toolchain.report.documents import Document, number, part, parts, ratio, text
from toolchain.report.figures import Figure, Key, draw
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import NOTHING, percent, seconds, signed_percent, size
from toolchain.report.palette import categories

GROUPS = {
    "routed_expert": "routed experts", "shared_expert": "shared experts and dense MLP",
    "dense_mlp": "shared experts and dense MLP", "attention": "attention", "embedding": "embedding and lm_head",
    "lm_head": "embedding and lm_head",
}  # fmt: skip
REST = "routers, norms, other"
SERVING = {
    "weights_per_gpu_bytes": "Weights on the fullest GPU",
    "kv_cache_per_gpu_bytes": "KV cache",
    "activations_per_gpu_bytes": "Activations",
}


def section(files: EngineFiles) -> Section:
    estimates = part(files.plan, "estimates")
    blocks: list[Block] = []
    if rows := _compared(files, estimates):
        columns = [Column(title="Figure")]
        columns += [Column(title=name, numeric=True) for name in ("Planned", "Measured", "Difference")]
        blocks.append(table("Plan against outcome", columns, rows))
    if assignments := parts(files.plan, "assignments"):
        blocks.append(_figure(assignments))
    blocks += _serving(estimates)
    if stages := _stages(files):
        blocks.append(stages)
    if basis := text(estimates, "basis"):
        blocks.append(
            Fold(summary="What the estimates rest on", blocks=(Paragraph(text=basis, tone="note"),))
        )
    if not blocks:
        blocks.append(
            missing("Sizes were", "plan.json, verify.json and checkpoint/quantize.json are not there")
        )
    return Section(id="size", short="Size", title="Size and memory", blocks=tuple(blocks))


def _compared(files: EngineFiles, estimates: Document) -> list[list[Cell | str]]:
    facts = part(files.audit, "facts")
    spent = part(files.quantize, "seconds")
    total = sum(value for key in spent if (value := number(spent, key)) is not None) or None
    written = number(facts, "bytes") or number(files.quantize, "tensor_bytes")
    pairs: list[tuple[str, float | None, float | None, Any]] = [
        ("Tensors of the checkpoint", number(estimates, "checkpoint_bytes"), written, size),
        ("Safetensors files, headers included", None, files.shard_bytes, size),
        ("Effective bits per parameter", number(estimates, "effective_bits"), number(facts, "effective_bits"), _bits),
        ("Memory to quantize (measured with all libraries)", number(estimates, "quantize_memory_bytes"),
         number(files.quantize, "peak_memory_bytes"), size),
        ("Time to quantize", number(estimates, "quantize_seconds"), total, seconds),
    ]  # fmt: skip
    rows: list[list[Cell | str]] = []
    for name, planned, found, show in pairs:
        if planned is None and found is None:
            continue
        times = ratio(found, planned)
        change = None if times is None else times - 1
        difference = _difference(change)
        rows.append(
            [
                name,
                Cell(text=show(planned), value=planned),
                Cell(text=show(found), value=found),
                Cell(text=difference, value=change, tone="" if change is not None else "muted"),
            ]
        )
    return rows


def _difference(change: float | None) -> str:
    if change is None or abs(change) >= 0.0005:
        return signed_percent(change, 1)
    return "exact" if change == 0 else "under 0.1\u00a0%"


def _bits(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _figure(assignments: list[Document]) -> Figure:
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for item in assignments:
        group = GROUPS.get(text(item, "role"), REST)
        sums["source", group] += number(item, "source_bytes") or 0
        sums["quantized", group] += number(item, "planned_bytes") or 0
    names = [name for name in dict.fromkeys([*GROUPS.values(), REST]) if sums["source", name]]
    before, after = (sum(sums[what, name] for name in names) for what in ("source", "quantized"))
    words = "; ".join(
        f"{name} {size(sums['source', name])} to {size(sums['quantized', name])}" for name in names
    )
    keys = tuple(
        Key(label=name, colour=shade) for name, shade in zip(names, categories(len(names)), strict=True)
    )
    return draw(
        _bars(sums, names),
        id="size-chart",
        title=f"Bytes by part: {size(before)} to {size(after)} ({percent(ratio(after, before), 1)})",
        alt=f"Two stacked bars. {words}.",
        keys=keys,
        height=80,
    )


def _bars(sums: dict[tuple[str, str], float], names: list[str]) -> Any:
    """``sums``: bytes by (``source`` or ``quantized``, part)."""
    from toolchain.report.charts import alt, data

    unit, scale = _unit(sum(sums["source", name] for name in names))
    rows = [
        {
            "what": what,
            "part": name,
            "order": names.index(name),
            "size": sums[what, name] / scale,
            "text": size(sums[what, name]),
        }
        for what in ("source", "quantized")
        for name in names
    ]
    return (
        alt.Chart(data(rows))
        .mark_bar()
        .encode(
            x=alt.X("size:Q", title=unit, stack="zero", axis=alt.Axis(tickCount=6)),
            y=alt.Y(
                "what:N", title=None, sort=["source", "quantized"], axis=alt.Axis(ticks=False, domain=False)
            ),
            color=alt.Color(
                "part:N", legend=None, scale=alt.Scale(domain=names, range=categories(len(names)))
            ),
            order="order:O",
            tooltip=[alt.Tooltip("what:N", title="model"), "part:N", alt.Tooltip("text:N", title="size")],
        )
    )


def _unit(value: float) -> tuple[str, float]:
    for name, scale in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if value >= scale:
            return name, scale
    return "B", 1


def _serving(estimates: Document) -> list[Block]:
    rows: list[list[Cell | str]] = []
    for key, words in SERVING.items():
        if (value := number(estimates, key)) is not None:
            rows.append([words, Cell(text=size(value), value=value)])
    if not rows:
        return []
    total = sum(number(estimates, key) or 0 for key in SERVING)
    available = number(estimates, "gpu_memory_bytes")
    used = ratio(total, available)
    share = "" if used is None else f" ({percent(used, 0)} of {size(available)})"
    rows.append(["Together", Cell(text=size(total) + share, value=total)])
    return [
        table(
            "Memory when served, as planned",
            [Column(title="Part"), Column(title="Memory", numeric=True)],
            rows,
        )
    ]


def _stages(files: EngineFiles) -> Table | None:
    rows: list[list[Cell | str]] = []
    for name in files.stages:
        record = part(files.stages, name)
        spent, peak = number(record, "seconds"), number(record, "peak_memory_bytes")
        if spent is not None and name != "report":
            rows.append([name, Cell(text=seconds(spent), value=spent), Cell(text=size(peak), value=peak)])
    columns = [
        Column(title="Stage"),
        Column(title="Time", numeric=True),
        Column(title="Peak memory so far", numeric=True),
    ]
    return table("Time and memory of the stages", columns, rows) if rows else None
