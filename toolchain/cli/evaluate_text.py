"""The evaluation report for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolchain.cli.output import facts, table

Report = dict[str, Any]


def _share(value: float) -> str:
    return f"{value:.2%}"


def _nats(value: float) -> str:
    return f"{value:.3g}"


FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("perplexity", "ppl", lambda value: f"{value:.4f}"),
    ("perplexity of the baseline", "baseline_ppl", lambda value: f"{value:.4f}"),
    ("increase of perplexity", "ppl_increase", lambda value: f"{value:+.3%}"),
    ("KL, mean", "kl_mean", _nats),
    ("KL, median", "kl_median", _nats),
    ("KL, p99", "kl_p99", _nats),
    ("reverse KL, mean", "reverse_kl_mean", _nats),
    ("reverse KL, median", "reverse_kl_median", _nats),
    ("reverse KL, p99", "reverse_kl_p99", _nats),
    ("top-1 agreement", "top1_agreement", _share),
    ("top-5 agreement", "top5_agreement", _share),
    ("router agreement", "router_agreement", _share),
    ("  whole set of experts", "router_set_agreement", _share),
    ("  by routing weight", "router_weighted_agreement", _share),
)
VARIANTS = {
    "target": "activations and KV cache as on the target",
    "weights": "weights only",
    "kv_none": "as on the target, KV cache not rounded",
}
SHOWN = 60
"""Characters of a prompt or an answer."""
BEFORE = 20
"""Of these, so many that both answers have in common."""


def render(report: Report) -> str:
    """Tables and lines of text, no colour: they survive logs and pipes."""
    parts = [_head(report), _figures(report)]
    if report["baseline"]:
        parts += [_variants(report), _layers(report), _answers(report)]
    return "\n\n".join(part for part in parts if part)


def _head(report: Report) -> str:
    data = report["data"]
    windows = f"windows of {data['window']}"
    if data["stride"] != data["window"]:
        windows += f", one every {data['stride']}"
    rows = [("checkpoint", report["checkpoint"])]
    if report["baseline"]:
        rows.append(("baseline", report["baseline"]))
    rows += [
        ("text", f"{data['source']}: {report['tokens']} tokens scored, {windows}, {data['token_hash'][:12]}"),
        ("figures", VARIANTS[report["emulation"]]),
    ]
    if data["calibration_overlap"] is not None:
        rows.append(("calibrated on", f"{data['calibration_overlap']:.1%} of this text"))
    if data.get("training_overlap") is not None:
        rows.append(("trained on", f"{data['training_overlap']:.1%} of this text"))
    return facts(rows)


def _figures(report: Report) -> str:
    rows = []
    for title, key, form in FIGURES:
        if report.get(key) is not None:
            low_high = report["intervals"].get(key)
            rows.append([title, form(report[key]), " to ".join(map(form, low_high)) if low_high else ""])
    return table(["figure", "value", "95 % interval"], rows) + "\nKL in nats per token"


def _variants(report: Report) -> str:
    keys = ("ppl", "kl_mean", "kl_p99", "top1_agreement", "router_agreement")
    forms = {key: form for _, key, form in FIGURES}
    rows = [
        [VARIANTS[name], *("-" if found[key] is None else forms[key](found[key]) for key in keys)]
        for name, found in report["variants"].items()
    ]
    return table(["run with", "perplexity", "KL mean", "KL p99", "top-1", "router"], rows)


def _layers(report: Report) -> str:
    rows = []
    for layer in report["layers"]:
        row = [layer["layer"], f"{layer['hidden_rms']:.3%}" if "hidden_rms" in layer else "-"]
        for key in ("router_agreement", "router_weighted_agreement", "load_shift"):
            row.append(_share(layer[key]) if key in layer else "-")
        rows.append(row)
    heads = ["layer", "hidden state error", "router agreement", "by weight", "load shift"]
    return table(heads, rows) if rows else ""


def _answers(report: Report) -> str:
    rows = []
    for answer in report["generations"]:
        at = answer["first_difference"]
        where = (
            f"the same {answer['tokens']} tokens" if at is None else f"differs at {at} of {answer['tokens']}"
        )
        rows.append([where, "prompt", _short(answer["prompt"], end=True)])
        if at is None:
            rows.append(["", "both", _short(answer["baseline"])])
            continue
        pairs = zip(answer["baseline"], answer["quantized"], strict=False)
        common = next((index for index, (one, other) in enumerate(pairs) if one != other), 0)
        for name in ("baseline", "quantized"):
            rows.append(["", name, _short(answer[name], start=common)])
    return table(["greedy answers", "", "text"], rows) if rows else ""


def _short(text: str, *, start: int = 0, end: bool = False) -> str:
    """About ``SHOWN`` characters in one line: the last ones, or those from shortly before ``start``."""
    begin = max(0, len(text) - SHOWN if end else start - BEFORE)
    shown = text[begin : begin + SHOWN].replace("\n", "\\n").replace("\t", "\\t")
    return f"{'...' if begin else ''}{shown}{'...' if begin + SHOWN < len(text) else ''}"
