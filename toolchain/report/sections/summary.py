"""Key figures, each with its interval."""

from __future__ import annotations

from toolchain.report.blocks import (
    Block,
    Cell,
    Column,
    Paragraph,
    Section,
    Table,
    Tile,
    Tiles,
    missing,
    table,
)
from toolchain.report.documents import Document, interval, number, part, ratio
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import between, count, percent, signed_percent, significant, size
from toolchain.report.verdict import gate_figures, gates_of, increase_of, measured

VARIANTS = {
    "weights": "weights only",
    "target": "weights and activations, as the target computes",
    "kv_none": "the same without KV-cache quantization",
}
"""Keys of ``variants`` in metrics.json, in the order in which they are shown."""


def section(files: EngineFiles) -> Section:
    metrics = files.metrics
    blocks: list[Block] = [Tiles(items=tuple(_tiles(files)))]
    if not measured(metrics):
        blocks.append(missing("Quality was", files.to_measure))
    elif number(metrics, "kl_mean") is None:
        blocks.append(missing("KL and agreement were", files.to_measure))
    if gates := gates_of(files):
        blocks.append(_gates(gates))
    for name in files.outdated:
        words = f"{name} is of other bytes than this engine has now, and is left out."
        blocks.append(Paragraph(text=words, tone="warning"))
    blocks += _variants(metrics)
    if part(metrics, "intervals"):
        blocks.append(Paragraph(text=_basis(part(metrics, "bootstrap")), tone="note"))
    return Section(id="summary", title="Summary", blocks=tuple(blocks))


def _basis(bootstrap: Document) -> str:
    drawn = [f"{count(number(bootstrap, key))} {key}" for key in ("resamples", "windows") if key in bootstrap]
    how = f" ({' of '.join(drawn)})" if drawn else ""
    return (
        f"Intervals are 95\u00a0%, bootstrap over windows{how}: what other text of this kind would change, not what "
        "another calibration would."
    )


def _tiles(files: EngineFiles) -> list[Tile]:
    metrics, tiles = files.metrics, []
    kl, top1, top5 = (number(metrics, key) for key in ("kl_mean", "top1_agreement", "top5_agreement"))
    if kl is not None:
        tiles.append(
            Tile(
                name="Mean KL (nats per token)",
                value=significant(kl),
                detail=between(interval(metrics, "kl_mean")),
            )
        )
    if top1 is not None:
        detail = between(interval(metrics, "top1_agreement"), percent)
        tiles.append(Tile(name="Top-1 agreement", value=percent(top1), detail=detail))
    if top5 is not None:
        detail = between(interval(metrics, "top5_agreement"), percent)
        tiles.append(Tile(name="Top-5 overlap", value=percent(top5), detail=detail))
    if (increase := increase_of(metrics)) is not None:
        detail = between(interval(metrics, "ppl_increase"), signed_percent) or (
            f"{significant(number(metrics, 'ppl'), 4)} against {significant(number(metrics, 'baseline_ppl'), 4)}"
        )
        tiles.append(Tile(name="Perplexity", value=signed_percent(increase), detail=detail))
    elif measured(metrics):
        tiles.append(Tile(name="Perplexity", value=significant(number(metrics, "ppl"), 4)))
    if (router := number(metrics, "router_agreement")) is not None:
        detail = between(interval(metrics, "router_agreement"), percent)
        tiles.append(Tile(name="Router agreement", value=percent(router), detail=detail))
    return tiles + _size_tiles(files)


def _size_tiles(files: EngineFiles) -> list[Tile]:
    written = number(part(files.audit, "facts"), "bytes") or number(files.quantize, "tensor_bytes")
    source = number(part(files.plan, "estimates"), "source_bytes")
    bits = effective_bits(files)
    tiles = []
    if written is not None:
        share = ratio(written, source)
        detail = "" if share is None else f"of {size(source)}: {percent(share, 1)}"
        tiles.append(Tile(name="Weights", value=size(written), detail=detail))
    if bits is not None:
        tiles.append(Tile(name="Effective bits per parameter", value=f"{bits:.2f}"))
    return tiles


def effective_bits(files: EngineFiles) -> float | None:
    """Of the whole checkpoint: as audited, else as planned."""
    audited = number(part(files.audit, "facts"), "effective_bits")
    return audited if audited is not None else number(part(files.plan, "estimates"), "effective_bits")


def _gates(gates: list[Document]) -> Table:
    rows: list[list[Cell | str]] = []
    for gate in gates:
        what, value, limit, outcome = gate_figures(gate)
        tone = {"passed": "good", "failed": "bad"}.get(outcome, "")
        cells = [Cell(text=value, value=number(gate, "value")), Cell(text=limit, value=number(gate, "limit"))]
        rows.append([what, *cells, Cell(text=outcome, value=outcome, tone=tone)])
    columns = [
        Column(title="Gate"),
        Column(title="Measured", numeric=True),
        Column(title="Limit", numeric=True),
    ]
    return table("Gates of this engine", [*columns, Column(title="Outcome")], rows)


def _variants(metrics: Document) -> list[Block]:
    variants = part(metrics, "variants")
    rows: list[list[Cell | str]] = []
    for key, words in VARIANTS.items():
        found = part(variants, key)
        if not found:
            continue
        kl, p99, ppl, top1 = (number(found, name) for name in ("kl_mean", "kl_p99", "ppl", "top1_agreement"))
        rows.append(
            [
                words,
                Cell(text=significant(kl), value=kl),
                Cell(text=significant(p99), value=p99),
                Cell(text=significant(ppl, 4), value=ppl),
                Cell(text=percent(top1), value=top1),
            ]
        )
    if len(rows) < 2:
        return []
    columns = [Column(title="What is emulated")]
    columns += [
        Column(title=name, numeric=True)
        for name in ("Mean KL (nats)", "p99 KL (nats)", "Perplexity", "Top-1")
    ]
    return [table("The same bytes under different emulation", columns, rows)]
