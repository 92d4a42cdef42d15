"""aiperf's figure over ours: the geometric mean over rounds, each of which sent the same requests with both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

ROWS = (
    ("ttft_ms.p50", "TTFT p50"),
    ("ttft_ms.mean", "TTFT mean"),
    ("itl_ms.mean", "gap between responses, mean"),
    ("tpot_ms.mean", "ITL (per token), mean"),
    ("e2e_ms.mean", "end to end, mean"),
    ("output_tokens_per_s", "tokens/s"),
)
LIMIT = 0.05
AT_ONCE = ("paced-http", "paced-openai")
"""Servers that send the first token at once."""


def render(document: Mapping[str, Any]) -> str:
    """Markdown."""
    cells = document["cells"]
    lines = ["| target | users | figure | ours | aiperf | difference | aiperf / ours | 95 % | within 5 % |"]
    lines.append("|---|--:|---|--:|--:|--:|--:|--:|---|")
    for target in dict.fromkeys(cell["target"] for cell in cells):
        for users in dict.fromkeys(cell["concurrency"] for cell in cells):
            for figure, words in ROWS:
                ours, theirs = (
                    _values(cells, tool, target, users, figure) for tool in ("toolchain", "aiperf")
                )
                if ours and len(ours) == len(theirs):
                    lines.append(_line(target, users, words, ours, theirs))
    cpu = f"{document['environment']['cpu']}, {document['environment']['cpu_cores']} cores"
    lines.append("")
    for target, how in document["targets"].items():
        lengths = f"prompts of {how['prompt_tokens']} and answers of {how['output_tokens']} tokens"
        lines.append(f"{target}: {how['rounds']} rounds of {how['requests']} requests, {lengths}.")
    return "\n".join([*lines, f"{document['engine']}, aiperf {document['aiperf']}, {cpu}."])


def _values(
    cells: Sequence[Mapping[str, Any]], tool: str, target: str, users: int, figure: str
) -> list[float]:
    found = [
        cell for cell in cells if (cell["tool"], cell["target"], cell["concurrency"]) == (tool, target, users)
    ]
    return [cell[figure] for cell in sorted(found, key=lambda cell: cell["round"]) if figure in cell]


def _line(target: str, users: int, words: str, ours: list[float], theirs: list[float]) -> str:
    ratio, low, high = paired_ratio(ours, theirs)
    interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
    agrees = "yes" if abs(ratio - 1) <= LIMIT else "**no**"
    if target in AT_ONCE and words.startswith("TTFT"):
        agrees = (
            "–"  # the server answers at once: it is the generators' own time, of which a ratio says nothing
        )
    one, other = (statistics.geometric_mean(values) for values in (ours, theirs))
    shown = f"{one:.2f} | {other:.2f} | {other - one:+.2f}"
    return f"| {target} | {users} | {words} | {shown} | {ratio:.3f} | {interval} | {agrees} |"


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Geometric mean of the ratios of the rounds, with its 95 % interval (Student's t on their logarithms)."""
    logs = [math.log(other / one) for one, other in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), None, None
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)
