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
    "TC-707": (
        "The process of the load generator ended",
        "It sends the load apart from everything else. The message has its last words; often memory ran out.",
    ),
    "TC-708": (
        "A trace of requests cannot be read",
        'JSON lines with "input_length" or "prompt", "output_length" and, for its times, "timestamp" in milliseconds; '
        "or a CSV with TIMESTAMP,ContextTokens,GeneratedTokens. The message names the line.",
    ),
    "TC-710": (
        "aiperf cannot be asked for this",
        "It speaks HTTP only, and is given lengths and a number of requests here. Without --engine aiperf everything "
        "is measured.",
    ),
    "TC-711": (
        "aiperf is not installed, or is another release",
        "`make aiperf` puts the release of requirements-aiperf.lock into an environment of its own (1.2 GB).",
    ),
    "TC-712": (
        "The files of aiperf are not what is expected",
        "Each finding says what is missing, has another unit, or contradicts another figure. Nothing was read as zero.",
    ),
    "TC-713": (
        "aiperf failed",
        "Its own words are in the message. Check that the server answers at the address, and raise --timeout for long "
        "answers.",
    ),
    "TC-714": (
        "No result to compare",
        "Give result files of `toolchain bench`, a directory of them, an engine, or several with commas.",
    ),
    "TC-715": (
        "Results that do not compare",
        "Each finding says what differs: lengths, loads, model, machine, failed requests. Measure both alike, or pass "
        "--force to compare all the same.",
    ),
}
