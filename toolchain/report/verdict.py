"""Fit to serve or not, why, and what the numbers say in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.report.documents import Document, interval, number, part, parts, ratio, text, yes_or_no
from toolchain.report.inputs import EngineFiles
from toolchain.report.numbers import NOTHING, between, count, percent, signed_percent, significant

GATES = {
    "max_kl": ("mean KL", "at most", "kl"),
    "max_ppl_increase": ("perplexity increase", "at most", "percent"),
    "min_top1": ("top-1 agreement", "at least", "percent"),
    "min_router_agreement": ("router agreement", "at least", "percent"),
}
"""Gate -> what it bounds, from which side, how its figures are written."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    state: str
    """``fit``, ``not fit`` or ``open``: nothing was asked for, or nothing measured."""
    headline: str
    reasons: tuple[str, ...] = ()

    @property
    def tone(self) -> str:
        return {"fit": "good", "not fit": "bad"}.get(self.state, "open")


def judge(files: EngineFiles) -> Verdict:
    """From the audit and the gates, as the stages wrote them. Nothing is judged here that they did not judge."""
    metrics, gates = files.metrics, gates_of(files)
    failed = [gate for gate in gates if gate.get("passed") is False]
    if files.audit.get("passed") is False:
        return Verdict(
            state="not fit",
            headline="Not fit to serve: the written bytes failed their audit",
            reasons=tuple(
                f"{text(item, 'code')}: {text(item, 'message')}" for item in _errors(files.audit)[:3]
            ),
        )
    if failed or (not gates and metrics.get("fit") is False):
        failing = (
            f"{len(failed)} of {len(gates)} gates failed" if failed else "marked as not fit by its evaluation"
        )
        reasons = tuple(gate_words(gate) for gate in failed)
        return Verdict(state="not fit", headline=f"Not fit to serve: {failing}", reasons=reasons)
    if not measured(metrics):
        return Verdict(state="open", headline="No verdict: quality was not measured")
    if gates:
        plural = "its gate passed" if len(gates) == 1 else f"all {len(gates)} gates passed"
        return Verdict(state="fit", headline=f"Fit to serve: {plural}", reasons=tuple(map(gate_words, gates)))
    return Verdict(state="open", headline="No gates were set: the numbers below are for you to judge")


def gates_of(files: EngineFiles) -> list[Document]:
    """As judged last, by any command (gates.json); else as judged with the metrics."""
    return parts(files.gates, "gates") or parts(files.metrics, "gates")


def measured(metrics: Document) -> bool:
    return metrics.get("measured") is not False and number(metrics, "ppl") is not None


def _errors(audit: Document) -> list[Document]:
    return [item for item in parts(audit, "findings") if item.get("severity", "error") == "error"]


def gate_words(gate: Document) -> str:
    """``mean KL 0.0200, at most 0.01: failed``."""
    what, value, limit, outcome = gate_figures(gate)
    return f"{what} {value}, {limit}: {outcome}"


def gate_figures(gate: Document) -> tuple[str, str, str, str]:
    """What it bounds, the measured value, the limit as it was asked for, the outcome."""
    what, side, unit = GATES.get(text(gate, "gate"), (text(gate, "gate"), "limit", "kl"))
    value, limit = number(gate, "value"), number(gate, "limit")
    outcome = yes_or_no(gate.get("passed"), "passed", "failed", "not judged")
    if unit == "percent":
        return what, percent(value), f"{side} {NOTHING if limit is None else f'{100 * limit:g} %'}", outcome
    return what, significant(value), f"{side} {NOTHING if limit is None else f'{limit:g}'}", outcome


def reading(metrics: Document) -> tuple[str, ...]:
    """The numbers in plain sentences. Nothing is called good or bad: that is what gates are for."""
    if not measured(metrics):
        return ()
    found = [_divergence(metrics), _perplexity(metrics), _emulation(metrics)]
    return tuple(sentence for sentence in found if sentence)


def _divergence(metrics: Document) -> str:
    kl, top1 = number(metrics, "kl_mean"), number(metrics, "top1_agreement")
    if kl is None:
        return ""
    ends = between(interval(metrics, "kl_mean"))
    words = f"Over {count(number(metrics, 'tokens'))} tokens the next-token distribution is {significant(kl)} nats "
    words += f"away from the baseline's on average{f' ({ends})' if ends else ''}"
    if top1 is None:
        return words + "."
    differing = 1 - top1
    share = f"about 1 token in {1 / differing:,.0f} has" if differing > 0 else "no token has"
    ends = between(interval(metrics, "top1_agreement"), percent)
    return f"{words}; {share} another most likely successor ({percent(top1)} agree{f'; {ends}' if ends else ''})."


def _perplexity(metrics: Document) -> str:
    ppl, baseline = number(metrics, "ppl"), number(metrics, "baseline_ppl")
    if baseline is None:
        ends = between(interval(metrics, "ppl"), lambda value: significant(value, 4))
        return f"Perplexity is {significant(ppl, 4)}{f' ({ends})' if ends else ''}; no baseline was given."
    ends = between(interval(metrics, "ppl_increase"), signed_percent)
    change = f"{signed_percent(increase_of(metrics))}{f' ({ends})' if ends else ''}"
    return f"Perplexity is {significant(ppl, 4)} against {significant(baseline, 4)}: {change}."


def increase_of(metrics: Document) -> float | None:
    """``ppl_increase``, or from the two perplexities where the document is older than the key."""
    given, ppl, baseline = (number(metrics, key) for key in ("ppl_increase", "ppl", "baseline_ppl"))
    times = ratio(ppl, baseline)
    return given if given is not None or times is None else times - 1


def _emulation(metrics: Document) -> str:
    how = {
        "target": "These figures include the rounding of activations as the target computes it",
        "weights": "These figures are of the quantized weights alone: activations were not rounded",
    }.get(text(metrics, "emulation"))
    if how is None:
        return ""
    other = {"target": "weights", "weights": "target"}[text(metrics, "emulation")]
    kl = number(part(metrics, "variants", other), "kl_mean")
    what = "weights alone" if other == "weights" else "rounded activations as well"
    return f"{how}{f' (with {what}: {significant(kl)} nats)' if kl is not None else ''}."
