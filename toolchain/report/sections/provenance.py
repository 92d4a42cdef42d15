"""Which text calibrated the model and which text judged it."""

from __future__ import annotations

from typing import Any

from toolchain.report.blocks import Block, Facts, Paragraph, Section, missing
from toolchain.report.documents import Document, as_text, number, part, text, texts, yes_or_no
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import count, percent


def section(files: EngineFiles) -> Section:
    blocks: list[Block] = []
    calibration = part(files.quantize, "calibration")
    if calibration:
        blocks.append(Facts(items=_calibration(calibration)))
    else:
        blocks.append(
            missing(
                "Calibration data were", "this checkpoint was made without, or quantize.json is not there"
            )
        )
    data = part(files.metrics, "data")
    if data:
        blocks.append(Facts(items=evaluation_facts(files.metrics)))
        blocks += _overlap(data) + _trained_on(data)
    return Section(id="data", short="Data", title="Calibration and evaluation data", blocks=tuple(blocks))


def _calibration(calibration: Document) -> tuple[tuple[str, str], ...]:
    template = text(calibration, "template_sha256")
    found = [
        ("Calibrated on", _sources(calibration.get("source"))),
        (
            "Samples",
            f"{count(number(calibration, 'samples'))} of {count(number(calibration, 'length_tokens'))} tokens",
        ),
        ("Seed", text(calibration, "seed")),
        ("Chat template", f"SHA-256 {template}" if template else "not applied"),
        ("Tokens SHA-256", text(calibration, "tokens_sha256")),
    ]
    return tuple((name, value) for name, value in found if value)


def _sources(value: Any) -> str:
    return ", ".join(texts(value)) or as_text(value)


def evaluation_facts(metrics: Document) -> tuple[tuple[str, str], ...]:
    data = part(metrics, "data")
    window, stride = number(data, "window"), number(data, "stride")
    stepping = f", stride {count(stride)}" if stride is not None else ""
    found = [
        ("Evaluated on", text(data, "source")),
        ("Tokens", f"{count(number(data, 'tokens'))} read, {count(number(metrics, 'tokens'))} scored"),
        ("Windows", f"{count(window)} tokens{stepping}" if window is not None else ""),
        ("Begin-of-text token", yes_or_no(data.get("bos"), "before every window", "none")),
        ("Tokens SHA-256", text(data, "token_hash")),
        ("Baseline", text(metrics, "baseline")),
    ]
    return tuple((name, value) for name, value in found if value)


def _overlap(data: Document) -> list[Block]:
    """A line about evaluation text that calibration has seen, in the forms that evaluation writes it."""
    found = data.get("calibration_overlap")
    if found is None:
        words = "Whether calibration saw the evaluation text is not known: its text was not at hand."
        return [Paragraph(text=words, tone="note")]
    share = number(found, "share") if isinstance(found, dict) else number(data, "calibration_overlap")
    if share is None:
        return []
    if share == 0:
        return [Paragraph(text="No part of the evaluation text stands in the calibration text.", tone="note")]
    words = f"{percent(share)} of the evaluation text stands in the calibration text: the figures flatter the engine."
    return [Paragraph(text=words, tone="warning")]


def _trained_on(data: Document) -> list[Block]:
    """A warning where a part of the evaluation text is training text."""
    share = number(data, "training_overlap")
    if not share:
        return []
    words = f"{percent(share)} of the evaluation text stands in the training text: the figures flatter the engine."
    return [Paragraph(text=words, tone="warning")]
