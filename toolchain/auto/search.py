"""Score every choice, solve for the budget, and keep the result only if it beats one format of its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from toolchain.auto.candidates import MIXED
from toolchain.auto.groups import choices_of
from toolchain.auto.held_out import HeldOut, held_out
from toolchain.auto.knapsack import Solution, solve
from toolchain.auto.modelopt import modelopt_scores
from toolchain.auto.sensitivity import measure
from toolchain.auto.space import Space
from toolchain.auto.verdict import Verdict, judge, measure_plans
from toolchain.core.errors import UsageError
from toolchain.core.progress import Progress, Silent
from toolchain.models.reader import resolve_model
from toolchain.plan.types import SOURCE_DTYPE, Plan

SCHEMA_VERSION = 1
TOKENS = 8192
"""Held-out tokens: every second window scores the groups, the others judge the result."""


def search(
    space: Space,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    tokens: int = TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The document ``auto.json``: what was measured, chosen and kept. ``outcome.plan_of`` makes a plan of it.

    UsageError TC-171 for a budget that cannot be reached.
    """
    progress = progress or Silent()
    refuse_budget(space)
    some = space.plan(space.smallest())
    held = held_out(some.calibration, resolve_model(some.model), data=None, tokens=tokens, progress=progress)
    halves = (held.part(0, 2), held.part(1, 2)) if len(held.windows) > 1 else (held, held)
    how: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "progress": progress,
    }
    scores = score(space, halves[0], how)
    solution = choose(space, scores)
    chosen = picked(space, solution)
    verdict = _verdict(space, chosen, halves[1], how)
    progress.note(f"auto: {verdict.kept} is kept, {verdict.reason}")
    return {
        "schema_version": SCHEMA_VERSION,
        **asdict(space.auto),
        "formats": list(space.formats),
        "main_format": space.main.name,
        "feasible_bits": [space.least_bits, space.most_bits],
        "held_out": {"scores": halves[0].identity, "verdict": halves[1].identity},
        "scores": [
            {"group": group, "format": name, "bytes": size, "score": scores[group, name]}
            for group, sizes in space.options.items()
            for name, size in sizes.items()
        ],
        "solver": {"score": solution.score, "exact": solution.exact},
        "chosen": chosen,
        "verdict": asdict(verdict),
    }


def refuse_budget(space: Space) -> None:
    """UsageError TC-171 when no choice is small enough, or all of them are."""
    if space.out_of_reach:
        raise UsageError(space.out_of_reach, hint=space.reach_hint, code="TC-171")


def score(space: Space, held: HeldOut, how: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """(group name, format name or ``source``) -> damage; additive over groups."""
    if space.auto.method != "sensitivity":
        return modelopt_scores(space, space.plan(space.smallest()), **how)
    plans = [space.plan_of(name) for name in space.formats]
    found = measure(space.info, plans, space.groups, held, **how)
    scores = {(group, SOURCE_DTYPE): 0.0 for group in space.options}
    for item in found:
        scores.setdefault((item.group, item.format), item.kl)
    return scores


def choose(space: Space, scores: Mapping[tuple[str, str], float]) -> Solution:
    options = [
        [(size, scores[group, name]) for name, size in sizes.items()]
        for group, sizes in space.weighted_options().items()
    ]
    solution = solve(options, space.budget)
    if solution is None:
        raise UsageError(space.out_of_reach, hint=space.reach_hint, code="TC-171")
    return solution


def picked(space: Space, solution: Solution) -> dict[str, str]:
    """Group name -> format name."""
    return {
        group: list(sizes)[pick]
        for (group, sizes), pick in zip(space.options.items(), solution.picks, strict=True)
    }


def _verdict(space: Space, chosen: dict[str, str], held: HeldOut, how: Mapping[str, Any]) -> Verdict:
    plans: dict[str, Plan] = {MIXED: space.plan(chosen)}
    for name in space.formats:
        uniform = space.uniform(name)
        if uniform is not None and space.bits_of_plan(uniform) <= space.auto.bits:
            plans[name] = uniform
    for name, plan in plans.items():
        if name != MIXED and _formats(space, plan) == _formats(space, plans[MIXED]):
            return Verdict(kept=name, reason=f"the search chose {name} for every part that it could")
    bits = {name: space.bits_of_plan(plan) for name, plan in plans.items()}
    if len(plans) == 1:
        return Verdict(
            kept=MIXED,
            reason="no uniform format fits the budget",
            measured={MIXED: {"kl": None, "kl_stderr": None, "bits": bits[MIXED]}},
        )
    return judge(measure_plans(plans, held.windows, **how), bits)


def _formats(space: Space, plan: Plan) -> list[str | None]:
    choices = choices_of(space.info, plan)
    found = [choices.format_of(linear) for linear in space.info.linears]
    return [item.name if item else None for item in found]
