"""Comparing two results, figure by figure, and the gate that CI asks: is B slower by more than so much?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from toolchain.bench.compare.comparable import differences
from toolchain.bench.compare.memory import MemoryRow, memory_rows
from toolchain.bench.compare.sides import Load, Side, load_words
from toolchain.bench.compare.significance import REPEATS, Estimate, adjusted, from_repeats, from_requests
from toolchain.bench.intervals import DISTRIBUTIONS, QUANTILES, RATES
from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.findings import Finding, errors

CODE = "TC-715"
DEFAULT = ("ttft_ms.p50", "tpot_ms.mean", "e2e_ms.p50", "output_tokens_per_s")
"""What is compared unless figures are named: one of each kind. More of them would only cost power."""
HIGHER_IS_BETTER = ("user_tokens_per_s", "goodput", *RATES)
FIGURES = (
    *(f"{name}.{quantile}" for name in DISTRIBUTIONS for quantile in QUANTILES),
    *RATES,
    "goodput.share",
    "goodput.requests_per_s",
)
ALPHA = 0.05
SLOWER, FASTER, SAME, UNKNOWN = "slower", "faster", "no significant difference", "cannot tell"
FAILED, PASSED, UNDECIDED = "failed", "passed", "undecided"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure at one load."""

    load: Load
    figure: str
    estimate: Estimate
    p_adjusted: float | None
    """For all comparisons by repeats at once; None for every other."""
    verdict: str
    """Of B against A: slower, faster, no significant difference, or cannot tell."""
    why: str
    """Why it cannot be told, or what the verdict does not cover; else empty."""
    slower_by: tuple[float | None, float | None, float | None]
    """Share by which B is slower, and the ends of its interval; below 0 it is faster. Of a rate: what is missing."""
    gate: str | None = None
    """failed, passed or undecided, where a limit was asked for."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    a: str
    b: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    """Differences that were forced, and what is worth knowing."""
    memory: tuple[MemoryRow, ...] = ()
    limit: float | None = None
    """Share, 0.05 for 5 %."""
    gates: dict[str, int] = field(default_factory=dict)
    """How many rows failed, passed, and are undecided; empty without a limit."""

    @property
    def failed(self) -> bool:
        return bool(self.gates.get(FAILED))

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        value["findings"] = [finding.to_json() for finding in self.findings]
        return {"schema_version": 1, **value}


def compare(
    a: Side, b: Side, *, figures: Sequence[str] = DEFAULT, limit: float | None = None, force: bool = False
) -> Comparison:
    """Every figure at every load that both sides have.

    ``limit``: a row fails the gate when B is significantly slower *and* by more than this share; it passes when the
    whole interval is within the limit, and is undecided when the data do not suffice to say. FindingsError TC-715 with
    every condition that differs, unless ``force``; UsageError for unknown figures, or when no load is common.
    """
    unknown = [figure for figure in figures if figure not in FIGURES]
    if unknown:
        hint = f"one of {', '.join(FIGURES)}"
        raise UsageError(f"unknown figure {', '.join(unknown)}", hint=hint, code=CODE)
    found = differences(a, b)
    common = [load for load in a.levels if load in b.levels]
    if not common:
        loads = [", ".join(map(load_words, side.levels)) for side in (a, b)]
        raise UsageError(f"no load is in both: A has {loads[0]}; B has {loads[1]}", code=CODE)
    if errors(found) and not force:
        raise FindingsError(
            f"{a.label} and {b.label} do not compare",
            found,
            hint="measure both alike; --force compares all the same",
            code=CODE,
        )
    rows = tuple(_rows(a, b, common, figures, limit))
    if not rows:
        raise UsageError(f"neither side has {', '.join(figures)} at a load that both have", code=CODE)
    kinds = [row.gate for row in rows]
    gates = {} if limit is None else {kind: kinds.count(kind) for kind in (FAILED, PASSED, UNDECIDED)}
    return Comparison(
        a=a.label,
        b=b.label,
        rows=rows,
        findings=tuple(found),
        memory=memory_rows(a, b),
        limit=limit,
        gates=gates,
    )


def _rows(
    a: Side, b: Side, loads: Sequence[Load], figures: Sequence[str], limit: float | None
) -> Iterator[Row]:
    found = [
        (load, figure, estimate)
        for load in loads
        for figure in figures
        if (estimate := _estimate(a, b, load, figure)) is not None
    ]
    tested = [
        index for index, (_, _, each) in enumerate(found) if each.basis == REPEATS and each.p is not None
    ]
    corrected = dict(zip(tested, adjusted([found[index][2].p or 0.0 for index in tested]), strict=True))
    for index, (load, figure, estimate) in enumerate(found):
        p = corrected.get(index, estimate.p)
        slower = _slower_by(figure, estimate)
        verdict = _verdict(p, slower[0])
        yield Row(
            load=load,
            figure=figure,
            estimate=estimate,
            p_adjusted=corrected.get(index),
            verdict=verdict,
            why=_why(estimate),
            slower_by=slower,
            gate=None if limit is None else _gate(estimate, verdict, slower, limit),
        )


def _estimate(a: Side, b: Side, load: Load, figure: str) -> Estimate | None:
    values_a, values_b = a.values(load, figure), b.values(load, figure)
    if not values_a or not values_b:
        return None
    name, _, quantile = figure.partition(".")
    one, other = a.single(load, name), b.single(load, name)
    # Gaps within a request depend on each other; the other times are one for each request.
    if one is not None and other is not None and quantile == "mean" and name != "itl_ms":
        return from_requests(one, other)
    return from_repeats(values_a, values_b)


def _slower_by(figure: str, estimate: Estimate) -> tuple[float | None, float | None, float | None]:
    ratios = (estimate.ratio, estimate.low, estimate.high)
    if figure.partition(".")[0] in HIGHER_IS_BETTER:
        middle, high, low = (None if ratio is None else 1 - ratio for ratio in ratios)
    else:
        middle, low, high = (None if ratio is None else ratio - 1 for ratio in ratios)
    return middle, low, high


def _verdict(p: float | None, slower: float | None) -> str:
    if p is None or slower is None:
        return UNKNOWN
    if p >= ALPHA or slower == 0:
        return SAME
    return SLOWER if slower > 0 else FASTER


def _why(estimate: Estimate) -> str:
    if estimate.basis == REPEATS:
        return ""
    if estimate.ratio is None:
        return "a figure is 0"
    if estimate.p is None:
        return f"{min(estimate.repeats)} repeat on one side: --repeats 3 measures the spread"
    return "within one run each: what differs from run to run is not in it"


def _gate(
    estimate: Estimate, verdict: str, slower: tuple[float | None, float | None, float | None], limit: float
) -> str:
    middle, _, high = slower
    if estimate.basis != REPEATS or middle is None or high is None:
        return UNDECIDED
    if verdict == SLOWER and middle > limit:
        return FAILED
    return PASSED if high <= limit else UNDECIDED
