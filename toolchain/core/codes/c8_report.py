"""The report."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-801": (
        "Nothing to report on",
        "Give engine directories: each holds at least one of engine.json, plan.json, metrics.json, verify.json and "
        "checkpoint/quantize.json.",
    ),
    "TC-802": (
        "A document of an engine cannot be understood",
        "The named file is JSON, but not what a stage writes. Remove it, or run the stage that writes it again.",
    ),
    "TC-803": (
        "A comparison needs engines and a place",
        "Give two or more different engines, and --output DIR for the page: it belongs to none of them.",
    ),
}
