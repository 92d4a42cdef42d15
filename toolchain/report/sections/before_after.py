"""What quantization changed of memory and speed: the source model, run by the same runtime, against the engine."""

from __future__ import annotations

from toolchain.bench.compare.compare import Comparison, Row, compare
from toolchain.bench.compare.memory import MemoryRow
from toolchain.bench.compare.sides import Side, load_words
from toolchain.bench.results import read_result
from toolchain.bench.types import BenchResult
from toolchain.core.errors import ToolchainError
from toolchain.report.blocks import Block, Cell, Column, Fold, Paragraph, Section, missing, table
from toolchain.report.documents import text
from toolchain.report.inputs import SOURCE_BENCHES, EngineFiles
from toolchain.report.numbers import NOTHING, significant, size

FIGURES = {
    "ttft_ms.p50": "TTFT p50 (ms)",
    "tpot_ms.mean": "Time per token, mean (ms)",
    "e2e_ms.p50": "End to end p50 (ms)",
    "output_tokens_per_s": "Tokens/s",
}


def section(files: EngineFiles) -> Section:
    return Section(
        id="before-after", short="Before and after", title="Before and after", blocks=_blocks(files)
    )


def _blocks(files: EngineFiles) -> tuple[Block, ...]:
    model = text(files.plan, "model") or "MODEL"
    place = f"{files.where}/{SOURCE_BENCHES}"
    remedy = (
        f"run `toolchain bench {model} --output {place}/before.json` and "
        f"`toolchain bench {files.where} --target inprocess`"
    )
    before = [path for path, _ in files.source_benches]
    if not before or not files.benches:
        return (missing("The source model was", remedy),)
    try:
        source = read_result(files.directory / SOURCE_BENCHES / before[-1])
        engine = _fitting(files, source)
        found = compare(Side("A", (source,)), Side("B", (engine,)), figures=tuple(FIGURES), force=True)
    except ToolchainError as error:
        return (Paragraph(text=f"Not compared: {error.message}.", tone="missing"),)
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        # Files that people wrote may hold anything; the comparison takes them at their word, a report must not fall.
        return (Paragraph(text="Not compared: a benchmark holds what is no measurement.", tone="missing"),)
    columns = [Column(title="Figure")]
    columns += [Column(title=title, numeric=True) for title in ("Source model", "Engine", "Engine / source")]
    rows = [*_memory(found.memory), *_speed(found.rows)]
    listed = table("Memory, latency and throughput", [*columns, Column(title="The engine is")], rows)
    return (*_warnings(found), listed, *_notes(found))


def _fitting(files: EngineFiles, source: BenchResult) -> BenchResult:
    """The newest result of the engine with the same target, else the newest."""
    results = [read_result(files.directory / "bench" / name) for name, _ in files.benches]
    return next((each for each in reversed(results) if each.target == source.target), results[-1])


def _warnings(found: Comparison) -> list[Block]:
    unlike = [
        f"{finding.where}: {finding.message}" for finding in found.findings if finding.severity == "error"
    ]
    if not unlike:
        return []
    words = f"These two were not measured alike (A is the source model, B the engine). {'; '.join(unlike)}."
    return [Paragraph(text=words, tone="warning")]


def _memory(rows: tuple[MemoryRow, ...]) -> list[list[Cell | str]]:
    found: list[list[Cell | str]] = []
    for row in rows:
        words = (
            ""
            if row.ratio is None
            else "smaller"
            if row.ratio < 1
            else "larger"
            if row.ratio > 1
            else "as large"
        )
        found.append(
            [
                Cell(text=f"{row.name[0].upper()}{row.name[1:]}", value=row.name, detail="memory"),
                Cell(text=size(row.a_bytes), value=row.a_bytes),
                Cell(text=size(row.b_bytes), value=row.b_bytes),
                Cell(text=_times(row.ratio), value=row.ratio),
                Cell(text=words, value=words, tone={"smaller": "good", "larger": "bad"}.get(words, "muted")),
            ]
        )
    return found


def _speed(rows: tuple[Row, ...]) -> list[list[Cell | str]]:
    cells: list[list[Cell | str]] = []
    for row in rows:
        each = row.estimate
        interval = "" if each.low is None else f"95\u00a0%: {_times(each.low)} to {_times(each.high)}"
        cells.append(
            [
                Cell(text=FIGURES[row.figure], value=row.figure, detail=load_words(row.load)),
                Cell(text=significant(each.a), value=each.a),
                Cell(text=significant(each.b), value=each.b),
                Cell(text=_times(each.ratio), value=each.ratio, detail=interval),
                Cell(text=row.verdict, value=row.verdict, tone=_tone(row.verdict)),
            ]
        )
    return cells


def _tone(verdict: str) -> str:
    return {"faster": "good", "slower": "bad"}.get(verdict, "muted")


def _times(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}"


def _notes(found: Comparison) -> list[Block]:
    words = [
        f"{finding.where}: {finding.message}" for finding in found.findings if finding.severity == "warning"
    ]
    words += dict.fromkeys(f"Cannot tell: {row.why}" for row in found.rows if row.why)
    words.append("Peak memory is that of whole processes, libraries included, and grows with the load.")
    notes = tuple(Paragraph(text=f"{line[0].upper()}{line[1:].rstrip('.')}.", tone="note") for line in words)
    return [Fold(summary="How they were measured", blocks=notes)]
