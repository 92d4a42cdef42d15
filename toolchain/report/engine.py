"""The report of one engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from toolchain.core.files import atomic_write_text
from toolchain.core.progress import Progress, Silent
from toolchain.report.blocks import Banner, Page, Section
from toolchain.report.documents import text
from toolchain.report.inputs import EngineFiles, read_engine
from toolchain.report.page import render
from toolchain.report.sections import (
    audit,
    before_after,
    commands,
    divergence,
    experts,
    footprint,
    formats,
    generations,
    layer_error,
    provenance,
    routing,
    sensitivity,
    speed,
    summary,
    tasks,
    training,
)
from toolchain.report.verdict import judge, reading

SECTIONS: tuple[Callable[[EngineFiles], Section | None], ...] = (
    summary.section,
    formats.section,
    training.section,
    experts.section,
    sensitivity.section,
    layer_error.section,
    divergence.section,
    routing.section,
    footprint.section,
    provenance.section,
    audit.section,
    generations.section,
    tasks.section,
    speed.section,
    before_after.section,
    commands.section,
    commands.versions,
)
"""In the order of the page; those that do not concern an engine give None."""
FILE = Path("report") / "index.html"
"""Where the report of an engine is, below its directory."""


def write_report(engine: Path, progress: Progress | None = None) -> Path:
    """Write ``<engine>/report/index.html``, atomically; returns its path.

    Reads the JSON files of the engine, whatever of them is there. UsageError TC-801 when there is none; ToolchainError
    TC-003 or TC-802 when one is damaged: an older report then stays as it is.
    """
    return write_report_to(engine, engine / FILE, progress)


def write_report_to(engine: Path, path: Path, progress: Progress | None = None) -> Path:
    """The same to another file."""
    files = read_engine(engine)
    (progress or Silent()).note(f"report: {path}")
    atomic_write_text(path, render(engine_page(files)))
    return path


def engine_page(files: EngineFiles) -> Page:
    verdict = judge(files)
    banner = Banner(
        tone=verdict.tone,
        headline=verdict.headline,
        sentences=(
            *(f"{reason[0].upper()}{reason[1:]}." for reason in verdict.reasons),
            *reading(files.metrics),
        ),
    )
    return Page(
        title=files.name,
        subtitle=subtitle(files),
        banners=(banner,),
        sections=tuple(found for section in SECTIONS if (found := section(files)) is not None),
        footer=f"Written by toolchain from the files of {files.where}. Every figure is read from them, "
        "none is computed from weights here.",
    )


def subtitle(files: EngineFiles) -> str:
    """``Qwen3MoeForCausalLM in nvfp4, KV cache fp8, for local on cpu``."""
    plan = files.plan
    kv_cache = text(plan, "kv_cache")
    found = [
        f"{text(plan, 'architecture')} in {text(plan, 'format')}" if plan else "",
        f"KV cache {kv_cache}" if kv_cache not in ("", "none") else "",
        f"for {text(plan, 'target')} on {text(plan, 'gpu')}" if text(plan, "target") else "",
    ]
    return ", ".join(part for part in found if part)
