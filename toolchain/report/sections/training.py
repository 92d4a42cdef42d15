"""What training under fake quantization gave, on which text, and how it went."""

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
    Tile,
    Tiles,
    table,
)
from toolchain.report.documents import Document, as_number, number, part, parts, text, texts
from toolchain.report.figures import draw
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import count, percent, seconds, significant

FIGURES = {
    "kl": "KL to the teacher",
    "ppl": "Perplexity",
    "top1": "Same first choice",
    "router": "Router agreement",
}
"""Keys of an evaluation in the record of training."""
SHARES = ("top1", "router")
METHODS = {
    "qad": "quantization-aware distillation (KL to the teacher's logits)",
    "qat": "quantization-aware training (next-token cross entropy)",
}


def section(files: EngineFiles) -> Section | None:
    """None for an engine that was not trained."""
    record = part(files.quantize, "training")
    if not record:
        return None
    blocks: list[Block] = [Tiles(items=_tiles(record))]
    if record.get("improved") is False:
        words = "Training did not improve the held-out figure: these weights are no better than without it."
        blocks.append(Paragraph(text=words, tone="warning"))
    blocks.append(Facts(items=_facts(record)))
    curve = [(step, item) for item in parts(record, "curve") if (step := number(item, "step")) is not None]
    points = [(step, kl) for step, item in curve if (kl := number(item, "kl")) is not None]
    if len(points) > 1:
        blocks.append(_chart(points))
    if curve:
        blocks.append(Fold(summary="Every evaluation", blocks=(_table(curve),)))
    return Section(id="training", short="Training", title="Training", blocks=tuple(blocks))


def _tiles(record: Document) -> tuple[Tile, ...]:
    before, after = part(record, "held_out", "before"), part(record, "held_out", "after")
    found = []
    for key, name in FIGURES.items():
        now, then = number(after, key), number(before, key)
        if now is not None:
            detail = f"before training {_shown(key, then)}" if then is not None else ""
            found.append(Tile(name=f"{name}, held-out", value=_shown(key, now), detail=detail))
    return tuple(found)


def _shown(key: str, value: float | None) -> str:
    return percent(value) if key in SHARES else significant(value)


def _facts(record: Document) -> tuple[tuple[str, str], ...]:
    settings, data = part(record, "settings"), part(record, "data")
    method = text(record, "method")
    rank = number(settings, "lora_rank")
    found = [
        ("Method", METHODS.get(method, method)),
        (
            "Teacher",
            {"source": "the unquantized source"}.get(text(record, "teacher"), text(record, "teacher")),
        ),
        ("Trained", f"adapters of rank {count(rank)}" if rank else "the weights themselves"),
        ("Roles", ", ".join(texts(settings.get("roles"))) or "those of the quantized matrices"),
        (
            "Steps",
            f"{count(number(record, 'steps'))} of {count(number(record, 'planned_steps'))}, the best was "
            f"{count(number(record, 'best_step'))}; ended by {text(record, 'stopped')}",
        ),
        ("Tokens seen", count(number(record, "tokens"))),
        ("Learning rate", significant(number(settings, "learning_rate"))),
        ("Time of the steps", seconds(as_number(part(record, "seconds").get("steps")))),
        ("Text", ", ".join(texts(settings.get("data")))),
        ("Training tokens SHA-256", text(data, "train_sha256")),
        ("Held-out tokens SHA-256", text(data, "held_out_sha256")),
    ]
    return tuple((name, value) for name, value in found if value)


def _chart(points: list[tuple[float, float]]) -> Block:
    from toolchain.report.charts import curve

    first, best, last = points[0], min(points, key=lambda item: item[1]), points[-1]
    alt = (
        f"Line over {len(points)} evaluations: {significant(first[1])} at step {count(first[0])}, least "
        f"{significant(best[1])} at step {count(best[0])}, {significant(last[1])} at step {count(last[0])}."
    )
    return draw(
        curve(points, x_title="optimizer step", y_title="held-out KL"),
        id="training-kl",
        title="KL divergence from the teacher on held-out text while training",
        alt=alt,
        note="Mean over tokens, in nats. The checkpoint has the weights of the best evaluation.",
    )


def _table(curve: list[tuple[float, Document]]) -> Table:
    kept = {
        key: name for key, name in FIGURES.items() if any(number(item, key) is not None for _, item in curve)
    }
    rows: list[list[Cell | str]] = []
    for step, item in curve:
        cells: list[Cell | str] = [Cell(text=count(step), value=step)]
        cells += [Cell(text=_shown(key, number(item, key)), value=number(item, key)) for key in kept]
        rows.append(cells)
    return table(
        "Held-out figures while training",
        [Column(title=name, numeric=True) for name in ("Step", *kept.values())],
        rows,
    )
