"""Results of `toolchain bench` for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from toolchain.cli.output import table

TIMES = {"ttft_ms": "TTFT", "itl_ms": "ITL", "e2e_ms": "E2E"}
QUANTILES = ("p50", "p90", "p99")


def render(result: Any) -> str:
    """Tables, and below them what must not be overlooked."""
    parts = [_latencies(result), _throughput(result), "\n".join(_notes(result))]
    warnings = list(_warnings(result))
    return "\n\n".join([*parts, *(["\n".join(warnings)] if warnings else [])])


def load_words(level: Any) -> str:
    if level.concurrency is None:
        return f"{level.rate:g}/s"
    return f"{level.concurrency} user{'' if level.concurrency == 1 else 's'}"


def _latencies(result: Any) -> str:
    rows = []
    for level in result.levels:
        cells: list[Any] = [load_words(level), level.requests, level.errors]
        for name in TIMES:
            found = getattr(level, name)
            cells += [f"{getattr(found, key):.1f}" if found else "-" for key in QUANTILES]
        rows.append([*cells, f"{level.tpot_ms.mean:.2f}" if level.tpot_ms else "-"])
    heads = ["load", "requests", "errors"]
    heads += [f"{name} {key}" for name in TIMES.values() for key in QUANTILES]
    return table([*heads, "TPOT mean"], rows)


def _throughput(result: Any) -> str:
    heads = ["load", "tokens/s", "per user", "per GPU", "requests/s"]
    goodput = any(level.goodput for level in result.levels)
    watched = any(level.gpu for level in result.levels)
    heads += ["good requests/s", "share"] if goodput else []
    heads += ["GPU GiB", "W", "J/token"] if watched else []
    rows = []
    for level in result.levels:
        user, each = level.user_tokens_per_s, level.output_tokens_per_s_per_gpu
        cells = [load_words(level), _rate(level), _number(user and user.p50), _number(each)]
        cells.append(f"{level.requests_per_s:.2f}")
        if goodput:
            found = level.goodput
            cells += [f"{found.requests_per_s:.2f}", f"{found.share:.0%}"] if found else ["-", "-"]
        if watched:
            gpu = level.gpu
            cells += [_number(gpu.memory_peak_gib), _number(gpu.power_mean_w)] if gpu else ["-", "-"]
            cells.append(
                "-" if gpu is None or gpu.energy_per_token_j is None else f"{gpu.energy_per_token_j:.3g}"
            )
        rows.append(cells)
    return table(heads, rows)


def _rate(level: Any) -> str:
    """With half the width of its interval."""
    interval = level.intervals.get("output_tokens_per_s")
    half = f" ± {(interval.high - interval.low) / 2:.1f}" if interval else ""
    return f"{level.output_tokens_per_s:.1f}{half}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _notes(result: Any) -> Iterator[str]:
    repeats = max((len(level.repeats) for level in result.levels), default=0)
    yield "times in ms; ITL: gaps between responses with text; TPOT: per request, per token after the first"
    if repeats > 1:
        yield f"±: 95 % confidence of the mean over {repeats} repeats (Student's t)"
    for level in result.levels:
        found = level.generator
        if found is not None and found.ceiling_tokens_per_s is not None:
            at_least = "" if found.ceiling_by == "generator" else "at least "
            yield (
                f"{load_words(level)}: the load generator alone reaches {at_least}{found.ceiling_tokens_per_s:.0f} "
                f"tokens/s, adds {found.added_ttft_ms:.1f} ms to TTFT; its event loop was {found.lag_p99_ms:.1f} ms "
                "late (p99)"
            )


def _warnings(result: Any) -> Iterator[str]:
    if result.partial:
        yield "INTERRUPTED: levels or repeats are missing"
    for level in result.levels:
        if level.generator is not None and level.generator.limited:
            reasons = "; ".join(level.generator.why)
            yield f"LIMITED BY THE LOAD GENERATOR at {load_words(level)}: {reasons}. The server may do better."
        if level.held_back:
            yield (
                f"OVERLOADED at {load_words(level)}: {level.held_back} requests were due while "
                f"{level.outstanding_peak} others ran, and waited"
            )
        for message, count in level.error_messages.items():
            yield f"{count} requests failed at {load_words(level)}: {message}"
