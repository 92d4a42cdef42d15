"""How far each layer's output is from the baseline's."""

from __future__ import annotations

from toolchain.report.blocks import Block, Cell, Column, Fold, Section, Table, missing, table
from toolchain.report.documents import Document, number, parts
from toolchain.report.figures import draw
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import percent

FIGURES = {
    "hidden_rms": "Relative RMS error",
    "router_agreement": "Router agreement",
    "router_set_agreement": "Same top-k set",
    "router_weighted_agreement": "Weighted agreement",
    "load_shift": "Load shift",
}
"""Keys of an entry of ``layers`` in metrics.json, all of them shares."""


def section(files: EngineFiles) -> Section:
    title = "Error layer by layer"
    layers = measured_layers(files.metrics)
    errors = [
        (layer, error) for layer, item in layers.items() if (error := number(item, "hidden_rms")) is not None
    ]
    if not errors:
        remedy = files.to_measure
        return Section(
            id="layers",
            short="Layer error",
            title=title,
            blocks=(missing("Errors of the layers were", remedy),),
        )
    from toolchain.report.charts import lines

    rows = [{"x": layer, "y": error, "series": "relative RMS error"} for layer, error in errors]
    chart = lines(
        rows, series=["relative RMS error"], x_title="layer", y_title="relative RMS error", y_format="~%",
        zero=True, layers=max(layers) + 1,
    )  # fmt: skip
    worst = max(errors, key=lambda item: item[1])
    alt = (
        f"Line over {len(errors)} layers: {percent(errors[0][1])} after layer {errors[0][0]}, {percent(errors[-1][1])} "
        f"after layer {errors[-1][0]}, at most {percent(worst[1])} after layer {worst[0]}."
    )
    blocks: list[Block] = [
        draw(
            chart,
            id="layer-error",
            title="Relative RMS error of the hidden states after each layer",
            alt=alt,
            note="||quantized - baseline|| / ||baseline|| of each position, root mean square; "
            "errors of earlier layers are in it.",
        ),
        Fold(summary="All figures by layer", blocks=(_table(layers),)),
    ]
    return Section(id="layers", short="Layer error", title=title, blocks=tuple(blocks))


def measured_layers(metrics: Document) -> dict[int, Document]:
    """Layer -> its entry in ``layers``."""
    found = {number(item, "layer"): item for item in parts(metrics, "layers")}
    return {
        int(layer): item
        for layer, item in sorted(found.items(), key=lambda pair: pair[0] or 0)
        if layer is not None
    }


def _table(layers: dict[int, Document]) -> Table:
    kept = {
        key: name
        for key, name in FIGURES.items()
        if any(number(item, key) is not None for item in layers.values())
    }
    rows: list[list[Cell | str]] = []
    for layer, item in layers.items():
        cells: list[Cell | str] = [Cell(text=str(layer), value=layer)]
        cells += [Cell(text=percent(number(item, key)), value=number(item, key)) for key in kept]
        rows.append(cells)
    columns = [Column(title=name, numeric=True) for name in ("Layer", *kept.values())]
    return table("Figures of every layer", columns, rows)
