"""toolchain bench compare"""

from __future__ import annotations

from typing import Any

import click

from toolchain.cli.options import engine_path, force_option, json_option
from toolchain.cli.output import Terminal, emit, size, table


class Share(click.ParamType):
    """``5%`` and ``0.05`` are the same."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            self.fail(f"{value!r} is no share: expected 5% or 0.05, from 0 to below 100%", param, ctx)
        return share


@click.command(name="compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--fail-if-slower",
    "limit",
    type=Share(),
    metavar="5%",
    help="Exit 1 when B is significantly slower by more than this at any load.",
)
@click.option(
    "--metric",
    "figures",
    multiple=True,
    metavar="NAME",
    help="Instead of ttft_ms.p50, tpot_ms.mean, e2e_ms.p50 and output_tokens_per_s; may be given several times.",
)
@force_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    a: str,
    b: str,
    limit: float | None,
    figures: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Compare two results of `toolchain bench`: is B slower than A, and is that more than chance?

    \b
      toolchain bench compare main.json branch.json --fail-if-slower 5%
      toolchain bench compare engines/mine-bf16 engines/mine-nvfp4
      toolchain bench compare a1.json,a2.json,a3.json b1.json,b2.json,b3.json --metric tpot_ms.p99

    A and B are result files, directories of them, engines (their newest result), or several with commas. Ratios come
    with 95 % confidence intervals from the spread between repeats. What was not measured alike is named and refused;
    --force compares it all the same.
    """
    from toolchain.bench.compare.compare import DEFAULT, compare
    from toolchain.bench.compare.sides import read_side

    found = compare(
        read_side(_named(a)), read_side(_named(b)), figures=figures or DEFAULT, limit=limit, force=force
    )
    for finding in found.findings:
        Terminal().note(f"{finding.severity}: {finding.where}: {finding.message}")
    emit(found.to_json(), as_json, render(found))
    if found.failed:
        ctx.exit(1)


def _named(text: str) -> str:
    """With the paths of engines that are given by their names."""
    return ",".join(str(engine_path(part)) for part in text.split(","))


def render(found: Any) -> str:
    gated = found.limit is not None
    heads = ["load", "figure", "A", "B", "B/A", "95 %", "repeats", "B is"]
    rows = [*map(_memory, found.memory), *(_cells(row, gated=gated) for row in found.rows)]
    parts = [
        table(
            [*heads, "gate"] if gated else heads,
            [[*row, *[""] * gated][: len(heads) + gated] for row in rows],
        )
    ]
    parts += [f"*: {why}" for why in dict.fromkeys(row.why for row in found.rows if row.why)]
    if gated:
        parts.append(_gate_words(found))
    return "\n\n".join(parts)


def _memory(row: Any) -> list[str]:
    sizes = ["-" if each is None else size(each) for each in (row.a_bytes, row.b_bytes)]
    return ["memory", row.name, *sizes, _ratio(row.ratio), "", "", ""]


def _cells(row: Any, *, gated: bool) -> list[str]:
    from toolchain.bench.compare.sides import load_words

    each = row.estimate
    interval = "-" if each.low is None else f"{_ratio(each.low)} to {_ratio(each.high)}"
    share = row.slower_by[0]
    words = (
        row.verdict
        if row.verdict in ("cannot tell", "no significant difference")
        else (f"{abs(share):.1%} {row.verdict}")
    )
    cells = [load_words(row.load), row.figure, f"{each.a:.4g}", f"{each.b:.4g}", _ratio(each.ratio)]
    cells += [interval, f"{each.repeats[0]}, {each.repeats[1]}", words + (" *" if row.why else "")]
    return [*cells, row.gate or ""] if gated else cells


def _gate_words(found: Any) -> str:
    failed, passed, undecided = (found.gates[kind] for kind in ("failed", "passed", "undecided"))
    verdict = "FAILED" if failed else "undecided" if undecided else "passed"
    words = f"--fail-if-slower {found.limit:.1%}: {verdict} ({failed} failed, {passed} passed, {undecided} undecided)"
    if undecided:
        words += (
            "\nundecided: the data do not suffice to say whether B is slower by more than that; measure both with more "
            "--repeats"
        )
    return words


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1000 else ">1000"
