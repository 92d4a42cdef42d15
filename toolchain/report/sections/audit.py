"""What the audit of the written bytes found."""

from __future__ import annotations

from toolchain.report.blocks import Block, Cell, Column, Facts, Paragraph, Section, missing, table
from toolchain.report.documents import number, part, parts, text, yes_or_no
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import count

SHOWN = 200
"""Findings that are listed; a damaged checkpoint can have one per tensor."""


def section(files: EngineFiles) -> Section:
    title, audit = "Audit of the written bytes", files.audit
    if not audit:
        remedy = f"run `toolchain verify {files.where}`"
        return Section(
            id="audit", short="Audit", title=title, blocks=(missing("The written bytes were", remedy),)
        )
    facts = part(audit, "facts")
    passed = yes_or_no(audit.get("passed"), "passed", "failed", "unknown")
    items = [
        ("Audit", passed),
        ("Tensors", count(number(facts, "tensors"))),
        ("Quantized modules", count(number(facts, "quantized_modules"))),
        ("Algorithm in its config", text(facts, "quant_algo")),
    ]
    blocks: list[Block] = [Facts(items=tuple((name, value) for name, value in items if value))]
    findings = parts(audit, "findings")
    rows: list[list[Cell | str]] = []
    for item in findings[:SHOWN]:
        severity = text(item, "severity") or "error"
        shown = Cell(text=severity, value=severity, tone="bad" if severity == "error" else "")
        rows.append([text(item, "code"), shown, text(item, "where"), text(item, "message")])
    if rows:
        columns = [Column(title=name) for name in ("Code", "Severity", "Where", "What was found")]
        blocks.append(table("Findings; `toolchain explain CODE` says more", columns, rows))
        if len(findings) > SHOWN:
            blocks.append(
                Paragraph(text=f"{count(len(findings) - SHOWN)} more are in verify.json.", tone="note")
            )
    else:
        blocks.append(Paragraph(text="No findings."))
    return Section(id="audit", short="Audit", title=title, blocks=tuple(blocks))
