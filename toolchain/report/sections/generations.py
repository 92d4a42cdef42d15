"""The same prompts continued by the baseline and by the engine."""

from __future__ import annotations

from toolchain.report.blocks import Answer, Block, Section, SideBySide, missing
from toolchain.report.documents import Document, number, parts, text
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import count


def section(files: EngineFiles) -> Section:
    title = "Generations side by side"
    found = parts(files.metrics, "generations")
    if not found:
        remedy = files.to_measure
        return Section(
            id="generations", short="Generations", title=title, blocks=(missing("Generations were", remedy),)
        )
    blocks: tuple[Block, ...] = tuple(map(_pair, found))
    return Section(id="generations", short="Generations", title=title, blocks=blocks)


def _pair(item: Document) -> SideBySide:
    baseline, quantized = text(item, "baseline"), text(item, "quantized")
    shared = shared_length(baseline, quantized)
    first, tokens = number(item, "first_difference"), number(item, "tokens")
    of = f" of {count(tokens)}" if tokens is not None else ""
    if first is None and baseline == quantized:
        verdict = f"The same text{f', all {count(tokens)} tokens' if tokens is not None else ''}."
    elif first is None:
        verdict = "The texts differ."
    else:
        verdict = f"First difference: token {count(first + 1)}{of}."
    return SideBySide(
        prompt=text(item, "prompt"),
        answers=(
            Answer(name="Baseline", shared=baseline[:shared], own=baseline[shared:]),
            Answer(name="Engine", shared=quantized[:shared], own=quantized[shared:]),
        ),
        verdict=verdict,
    )


def shared_length(one: str, other: str) -> int:
    """Characters before the first that differs."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
