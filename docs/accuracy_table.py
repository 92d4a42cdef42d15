"""The README's table of accuracy against peers, made from benchmarks/results/accuracy.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolchain.formats import get_format
from toolchain.recipes import BEST

RECORD = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "accuracy.json"
COLUMNS = (
    "ModelOpt",
    "llm-compressor",
    "llm-compressor GPTQ",
    "default",
    "best",
    "best / ModelOpt",
    "best / default",
)
Row = dict[str, Any]


def accuracy() -> str:
    """KL per format and model, every Linear of the decoder quantized; one line per format that was compared."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = {(row["model"], row["method"]): row for row in record["rows"]}
    models = list(record["models"])
    lines = [
        f"| KL to source, 1e-3 nats | model | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    formats = dict.fromkeys(row["cell"].split("/")[0] for row in record["rows"] if row["kind"] == "ours")
    for name in formats:
        lines += [line for model in models if (line := _line(rows, name, model))]
    held = record["evaluation"]
    lines += [
        "",
        f"{held['windows']} held-out windows of {held['length_tokens']} tokens, "
        f"{record['calibration']['samples']} calibration samples; means over calibration seeds where several were run "
        "(± their standard deviation), 95 % intervals of paired windows in brackets. Best: "
        + ", ".join(f"`{BEST[name]}` for {name}" for name in formats if name in BEST)
        + ".",
    ]
    return "\n".join(lines)


def _line(rows: dict[tuple[str, str], Row], name: str, model: str) -> str:
    def row(kind: str, recipe: str) -> Row | None:
        return rows.get((model, f"{kind}-{name}-{recipe.replace('+', '_')}-all"))

    best = row("ours", BEST.get(name, get_format(name).default_recipe))
    found = [
        row("modelopt", "default"),
        row("llmcompressor", "default"),
        row("llmcompressor", "gptq"),
        row("ours", get_format(name).default_recipe),
        best,
    ]
    if best is None:
        return ""
    ratios = (_ratio(best, peer) for peer in ("ModelOpt", "our default"))
    return f"| {name} | {model} | {' | '.join(map(_kl, found))} | {' | '.join(ratios)} |"


def _kl(row: Row | None) -> str:
    if row is None:
        return "-"
    spread = f" ± {row['kl_seed_sd'] * 1e3:.3f}" if row["kl_seed_sd"] else ""
    return f"{row['kl_mean'] * 1e3:.3f}{spread}"


def _ratio(row: Row, peer: str) -> str:
    ratio = (row["ratios"] or {}).get(peer)
    if not ratio:
        return "-"
    value, low, high = (ratio[key] for key in ("ratio", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
