"""Benchmarks."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-701": ("Bad benchmark settings", "The message lists each setting with what was expected."),
    "TC-702": (
        "The server cannot be reached or does not answer",
        "Start it with `toolchain serve`, check the address.",
    ),
    "TC-703": (
        "The engine's tokenizer cannot be loaded",
        "Tokens are counted with it. Give the engine (or its checkpoint directory) that the server runs.",
    ),
    "TC-704": ("Every request of a benchmark failed", "The first error is shown; the server's log has more."),
    "TC-705": (
        "A report of trtllm-bench cannot be imported",
        "Each finding says which key is missing, which figures contradict each other, or what is another than in the "
        "engine. commands.md in the engine has the command that measures it.",
    ),
    "TC-706": (
        "A file is no result of toolchain bench",
        "Results are the JSON files in ENGINE/bench, of schema version 1 or 2.",
    ),
}
