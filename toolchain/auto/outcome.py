"""From ``auto.json`` to the plan that is carried out, and what a plan can say before anything is measured. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from toolchain.auto.candidates import MIXED
from toolchain.auto.space import Space
from toolchain.core.errors import ToolchainError
from toolchain.core.findings import Finding
from toolchain.plan.types import Plan

TOLD = ("bits", "cost", "formats", "method", "feasible_bits", "solver", "verdict")
"""Keys of the document that go into the plan; scores of every group stay in auto.json."""


def plan_of(space: Space, document: Mapping[str, Any]) -> Plan:
    """The plan that the search kept, with ``auto`` and, where that is a uniform one, a finding TC-172.

    ToolchainError TC-174 for a document that is of another model or request.
    """
    kept = document["verdict"]["kept"]
    if set(document["chosen"]) != set(space.options):
        raise ToolchainError(
            f"auto.json speaks about {len(document['chosen'])} layer groups, the request about {len(space.options)}",
            hint="delete it, or pass --force, to search again",
            code="TC-174",
        )
    mixed = space.plan(document["chosen"])
    plan = mixed if kept == MIXED else space.uniform(kept)
    if plan is None or space.bits_of_plan(plan) > space.auto.bits:
        raise ToolchainError(
            f"the plan that auto.json keeps ({kept}) does not hold the budget of {space.auto.bits:g} bits",
            hint="delete it, or pass --force, to search again",
            code="TC-174",
        )
    told = {key: document[key] for key in TOLD}
    told["reached_bits"] = {MIXED: space.bits_of_plan(mixed), "kept": space.bits_of_plan(plan)}
    findings = [] if kept == MIXED else [_uniform(kept, document["verdict"])]
    return replace(plan, auto=told, findings=(*plan.findings, *findings))


def preview(space: Space) -> Plan:
    """The smallest choice, with what the search would do as a finding: a plan reads no weights."""
    plan = space.plan(space.smallest())
    asked = {**asdict(space.auto), "formats": list(space.formats)}
    if space.out_of_reach:
        finding = Finding(code="TC-171", where="--bits", message=space.out_of_reach, hint=space.reach_hint)
    else:
        finding = Finding(
            code="TC-173",
            where="--format auto",
            message=f"{len(space.groups)} layer groups would get {', '.join(space.formats)} or the source dtype each, "
            f"scored by {space.auto.method}, at most {space.auto.bits:g} bits per parameter; from "
            f"{space.least_bits:.3f} to {space.most_bits:.3f} can be reached, and the smallest is shown here",
            hint="`toolchain quantize` and `toolchain engine` measure and choose",
            severity="warning",
        )
    feasible = [space.least_bits, space.most_bits]
    return replace(
        plan, auto={**asked, "feasible_bits": feasible, "verdict": None}, findings=(*plan.findings, finding)
    )


def _uniform(kept: str, verdict: Mapping[str, Any]) -> Finding:
    return Finding(
        code="TC-172",
        where="--format auto",
        message=f"uniform {kept} is kept: {verdict['reason']}",
        hint="auto.json has the scores of every layer group",
        severity="warning",
    )
