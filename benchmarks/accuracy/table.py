"""The result file from the single runs, and its markdown table."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.accuracy.architectures import BY_NAME as ARCHITECTURES
from benchmarks.accuracy.data import LENGTH, SAMPLES, WINDOWS
from benchmarks.accuracy.judge import interval, ratio_interval
from benchmarks.accuracy.methods import BY_NAME, METHODS, REFERENCES, Method
from benchmarks.accuracy.models import RECORD
from benchmarks.accuracy.places import MODELS, RESULT, run_file
from toolchain.core.files import atomic_write_json, read_json
from toolchain.formats import get_format

FIGURES = ("kl_mean", "kl_median", "kl_p99", "ppl", "top1_agreement")
Row = dict[str, Any]


def assemble() -> dict[str, Any]:
    """Models, and one row per (model, method): means over seeds, their spread, ratios to both peers' defaults."""
    models = {name: _model(name) for name in ARCHITECTURES if (MODELS / name / RECORD).is_file()}
    rows = [row for method in METHODS for model in models if (row := _row(model, method)) is not None]
    versions: dict[str, str] = {}
    for row in rows:
        versions |= {f"{row['kind']}: {name}": value for name, value in row.pop("versions").items()}
    return {
        "evaluation": {"windows": WINDOWS, "length_tokens": LENGTH},
        "calibration": {"samples": SAMPLES, "length_tokens": LENGTH},
        "models": models,
        "rows": rows,
        "versions": versions,
    }


def write(result: dict[str, Any]) -> None:
    RESULT.parent.mkdir(exist_ok=True)
    atomic_write_json(RESULT, result)


def _model(name: str) -> dict[str, Any]:
    record = read_json(MODELS / name / RECORD)
    return {key: value for key, value in record.items() if key not in ("identity", "versions", "name")}


def _runs(model: str, method: Method) -> list[Row]:
    paths = [run_file(model, method.name, seed) for seed in method.seeds]
    return [read_json(path) for path in paths if path.is_file()]


def _row(model: str, method: Method) -> Row | None:
    runs = _runs(model, method)
    if not runs:
        return None
    first = runs[0]
    kl = [run["kl_mean"] for run in runs]
    row: Row = {
        "model": model,
        "method": method.name,
        "kind": method.kind,
        "cell": method.cell,
        "seeds": [run["seed"] for run in runs],
        **{figure: statistics.mean(run[figure] for run in runs) for figure in FIGURES},
        "baseline_ppl": first["baseline_ppl"],
        "kl_per_seed": kl,
        "kl_seed_sd": statistics.stdev(kl) if len(kl) > 1 else None,
        "kl_interval": list(interval(_windows(runs))),
        "judged": sorted({run["judged"] for run in runs}),
        "why": first.get("why"),
        "recipe": first.get("recipe"),
        "stored": first.get("stored"),
        "same_calibration": all(run.get("same_calibration", True) for run in runs),
        "seconds": first.get("seconds"),
        "versions": first["versions"],
    }
    return row | {"ratios": {peer: _ratio(model, method, runs, peer) for peer in REFERENCES}}


def _ratio(model: str, method: Method, runs: list[Row], peer: str) -> Row | None:
    """Mean KL over that of the peer's default of the cell, on the seeds that both have; windows in pairs."""
    suffix = "all" if method.policy == "all-linear" else "experts"
    default = "" if method.format == "source" else get_format(method.format).default_recipe.replace("+", "_")
    reference = BY_NAME.get(REFERENCES[peer].format(format=method.format, recipe=default) + f"-{suffix}")
    theirs = _runs(model, reference) if reference else []
    if not theirs or reference is method:
        return None
    seeds = {run["seed"] for run in runs} & {run["seed"] for run in theirs}
    runs, theirs = ([run for run in side if run["seed"] in seeds] for side in (runs, theirs))
    if not seeds:
        return None
    low, high = ratio_interval(_windows(runs), _windows(theirs))
    ratio = statistics.mean(r["kl_mean"] for r in runs) / statistics.mean(r["kl_mean"] for r in theirs)
    stored = [(row.get("stored") or {}).get("names_sha256") for row in (runs[0], theirs[0])]
    known = None not in stored
    return {
        "ratio": ratio,
        "low": low,
        "high": high,
        "same_modules": stored[0] == stored[1] if known else None,
    }


def _windows(runs: list[Row]) -> torch.Tensor:
    """[windows] mean over seeds."""
    return torch.tensor([run["kl_windows"] for run in runs], dtype=torch.float64).mean(dim=0)


def render(result: dict[str, Any]) -> str:
    """Markdown: the models, then one table per cell."""
    lines = [
        "| model | parameters | perplexity | unigram | activation kurtosis | channel ratio | weight kurtosis |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, model in result["models"].items():
        lines.append(_model_line(name, model))
    for cell in dict.fromkeys(row["cell"] for row in result["rows"]):
        lines += ["", f"### {cell}", "", _HEAD, "|---|---|---|---|---|---|---|---|---|---|"]
        lines += [_line(row) for row in result["rows"] if row["cell"] == cell]
    return "\n".join(lines)


_HEAD = "| model | method | KL, 1e-3 nats | seeds sd | p99 | ppl +% | top-1 % | bits | / ModelOpt | / llm-compressor |"


def _model_line(name: str, model: Row) -> str:
    tails = model["tensors"]
    pairs = [
        f"{tails[f'{key}_median']:.1f} ({tails[f'{key}_max']:.1f})"
        for key in ("activation_kurtosis", "activation_channel_ratio", "weight_kurtosis")
    ]
    perplexity, unigram = model["held_out_perplexity"], model["unigram_perplexity"]
    return f"| {name} | {model['parameters'] / 1e6:.1f}M | {perplexity:.1f} | {unigram:.0f} | {' | '.join(pairs)} |"


def _line(row: Row) -> str:
    low, high = (1e3 * value for value in row["kl_interval"])
    spread = f"{1e3 * row['kl_seed_sd']:.3f}" if row["kl_seed_sd"] is not None else "-"
    bits = (row["stored"] or {}).get("effective_bits")
    mark = "" if "in memory" not in row["judged"] else " (in memory)"
    cells = [
        row["model"],
        row["method"] + mark,
        f"{1e3 * row['kl_mean']:.3f} [{low:.3f}, {high:.3f}]",
        spread,
        f"{1e3 * row['kl_p99']:.1f}",
        f"{100 * (row['ppl'] / row['baseline_ppl'] - 1):+.2f}",
        f"{100 * row['top1_agreement']:.2f}",
        f"{bits:.3f}" if bits else "-",
        *(_ratio_text(row["ratios"][peer]) for peer in REFERENCES),
    ]
    return f"| {' | '.join(cells)} |"


def _ratio_text(ratio: Row | None) -> str:
    if ratio is None:
        return "-"
    other = "" if ratio["same_modules"] is not False else " other layers!"
    return f"{ratio['ratio']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]{other}"
