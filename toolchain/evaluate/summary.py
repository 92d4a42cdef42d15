"""Records to figures: means, percentiles, histogram, layers, intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from toolchain.core.errors import ToolchainError
from toolchain.evaluate import intervals
from toolchain.evaluate.divergence import TOP
from toolchain.evaluate.records import Records

HISTOGRAM_EDGES = tuple(float(f"{edge:.6g}") for edge in np.logspace(-8, 1, 46))
"""Nats, five bins per decade from 1e-8 to 10. What is below or beyond counts in the first and last bin."""
LARGEST_NLL = 700.0
"""Nats per token: exp() of more does not fit a float64, and a uniform guess over a million tokens is 14."""


def figures(records: Records, variant: str) -> dict[str, Any]:
    """The flat figures of one variant; those against the baseline only when there was one."""
    nll = float(records[f"{variant}/nll"].mean())
    found: dict[str, Any] = {"tokens": len(records[f"{variant}/nll"]), "nll": nll, "ppl": _ppl(nll)}
    if f"{variant}/kl" not in records:
        return found
    baseline = float(records["baseline/nll"].mean())
    found |= {"baseline_ppl": _ppl(baseline), "ppl_increase": float(np.expm1(nll - baseline))}
    for name in ("kl", "reverse_kl"):
        values = records[f"{variant}/{name}"]
        median, p99 = np.quantile(values, [0.5, 0.99])
        found |= {f"{name}_mean": float(values.mean()), f"{name}_median": float(median)}
        found[f"{name}_p99"] = float(p99)
    found["top1_agreement"] = float(records[f"{variant}/top1"].mean())
    found["top5_agreement"] = float(records[f"{variant}/top5"].mean() / TOP)
    return found | routing(records, variant)


def routing(records: Records, variant: str) -> dict[str, Any]:
    """Agreement over all MoE layers; None where nothing is routed, or was not recorded alike."""
    if f"{variant}/routing" not in records:
        names = ("router_agreement", "router_set_agreement", "router_weighted_agreement")
        return {**dict.fromkeys(names), "router_agreement_by_layer": []}
    by_layer = _by_layer(records, variant)
    common, same, weighted = (float(value) for value in by_layer.mean(axis=0))
    return {
        "router_agreement": common,
        "router_set_agreement": same,
        "router_weighted_agreement": weighted,
        "router_agreement_by_layer": [float(value) for value in by_layer[:, 0]],
    }


def _by_layer(records: Records, variant: str) -> np.ndarray:
    """[MoE layers, 3] means over positions."""
    return np.asarray(records[f"{variant}/routing"].sum(axis=0) / records["fresh"].sum())


def layers(records: Records, variant: str, experts: dict[int, int]) -> list[dict[str, Any]]:
    """One entry per decoder layer; ``experts``: MoE layer -> how many it has. Without a baseline only loads."""
    moe, known = sorted(experts), f"{variant}/hidden" in records
    found: list[dict[str, Any]] = []
    for layer in range(records[f"{variant}/hidden"].shape[1]) if known else moe:
        entry: dict[str, Any] = {"layer": layer}
        if known:
            squares = records[f"{variant}/hidden"][:, layer].sum() / records["fresh"].sum()
            entry["hidden_rms"] = float(np.sqrt(squares))
        if layer in experts:
            entry |= _moe_layer(records, variant, moe.index(layer), experts[layer])
        found.append(entry)
    return found


def _moe_layer(records: Records, variant: str, index: int, experts: int) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    if f"{variant}/routing" in records:
        names = ("router_agreement", "router_set_agreement", "router_weighted_agreement")
        entry |= dict(zip(names, map(float, _by_layer(records, variant)[index]), strict=True))
    if f"{variant}/load" not in records:
        return entry
    load = _shares(records[f"{variant}/load"][:, index, :experts])
    entry["load"] = load.tolist()
    if "baseline/load" in records:
        before = _shares(records["baseline/load"][:, index, :experts])
        entry |= {"baseline_load": before.tolist(), "load_shift": float(np.abs(load - before).sum() / 2)}
    return entry


def _shares(counts: np.ndarray) -> np.ndarray:
    """[batches, experts] choices -> [experts] shares that add up to 1."""
    total = counts.sum(axis=0)
    return np.asarray(total / max(1, total.sum()))


def histogram(records: Records, variant: str) -> dict[str, Any]:
    """How many tokens have which KL(baseline || quantized)."""
    edges = np.array(HISTOGRAM_EDGES)
    counts, _ = np.histogram(np.clip(records[f"{variant}/kl"], edges[0], edges[-1]), bins=edges)
    return {"edges": list(HISTOGRAM_EDGES), "counts": counts.tolist()}


def confidence(records: Records, variant: str) -> dict[str, list[float]]:
    """95 % intervals of what is a mean over tokens or positions; empty for fewer than two windows."""
    if len(records["scored"]) < 2:
        return {}
    names = [name for name in ("kl", "reverse_kl", "top1", "top5") if f"{variant}/{name}" in records]
    keys = ["baseline/nll"] if names else []
    keys = [f"{variant}/nll", *keys, *(f"{variant}/{name}" for name in names)]
    sums = np.stack([records.per_window(key) for key in keys], axis=1)
    means = intervals.resampled_means(sums, records["scored"].astype(float)).T
    found = {"ppl": np.exp(means[0])}
    if names:
        found |= {"baseline_ppl": np.exp(means[1]), "ppl_increase": np.expm1(means[0] - means[1])}
        kl, reverse, top1, top5 = means[2:]
        found |= {"kl_mean": kl, "reverse_kl_mean": reverse, "top1_agreement": top1}
        found["top5_agreement"] = top5 / TOP
    if f"{variant}/routing" in records:
        sums = records[f"{variant}/routing"].mean(axis=1)
        routed = intervals.resampled_means(sums, records["fresh"].astype(float)).T
        keys = ["router_agreement", "router_set_agreement", "router_weighted_agreement"]
        found |= dict(zip(keys, routed, strict=True))
    return {name: intervals.interval(values) for name, values in found.items()}


def _ppl(nll: float) -> float:
    if nll > LARGEST_NLL:
        raise ToolchainError(
            f"{nll:.0f} nats per token are no perplexity: this model computes nonsense",
            hint="`toolchain verify` audits the checkpoint",
            code="TC-527",
        )
    return float(np.exp(nll))
