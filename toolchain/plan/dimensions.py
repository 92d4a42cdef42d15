"""Divisibility: by a format's groups and blocks, and by tensor and expert parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

from toolchain.core.findings import Finding
from toolchain.core.roles import QUANTIZABLE, Role
from toolchain.formats.base import Format
from toolchain.models.types import LinearInfo, ModelInfo
from toolchain.plan.choices import Choices
from toolchain.plan.memory import moe_tp
from toolchain.plan.types import Serving


@dataclass(frozen=True, kw_only=True)
class _Dimension:
    """One width of the model that parallelism cuts into ``ranks`` pieces."""

    label: str
    size: int
    ranks: int
    multiple: int
    """What each rank's piece must be a multiple of; 1 when the part is not quantized."""
    role: Role


def format_findings(info: ModelInfo, choices: Choices) -> Iterator[Finding]:
    """One finding per kind of matrix whose shape its format cannot store."""
    groups: dict[tuple[Role, str, int, int, Format], list[LinearInfo]] = {}
    for linear, found in choices.quantized(info):
        key = (linear.part.role, linear.part.projection, linear.out_features, linear.in_features, found)
        groups.setdefault(key, []).append(linear)
    for (role, projection, out_features, in_features, format), members in groups.items():
        problems = []
        if in_features % format.in_multiple:
            problems.append(f"in_features {in_features} is not a multiple of {format.in_multiple}")
        if out_features % format.out_multiple:
            problems.append(f"out_features {out_features} is not a multiple of {format.out_multiple}")
        if problems:
            what = f"{len(members)} x {projection} ({role.value}) of shape [{out_features}, {in_features}]"
            yield Finding(
                code="TC-110",
                where=members[0].name,
                message=f"{what} do not fit {format.name}: {' and '.join(problems)}",
                hint=_other_policy(role),
            )


def _other_policy(role: Role) -> str:
    narrower = {Role.ATTENTION: "--policy mlp-only", Role.DENSE_MLP: "--policy experts-only"}
    narrower |= {Role.SHARED_EXPERT: "--shared-experts bf16", Role.LM_HEAD: "--lm-head bf16"}
    leave_out = narrower.get(role)
    other = "a format with smaller groups (fp8 has none, nvfp4 has 16)"
    return f"use {leave_out}, which leaves them out, or {other}" if leave_out else f"use {other}"


def rank_findings(info: ModelInfo, choices: Choices, serving: Serving) -> Iterator[Finding]:
    """One finding per width that tp (within experts: tp / ep) does not cut into whole, storable pieces."""
    for dimension in _dimensions(info, choices, serving):
        if dimension.ranks == 1:
            continue
        over = f"{dimension.label} {dimension.size} over tp={dimension.ranks}"
        if dimension.role is Role.ROUTED_EXPERT and serving.ep > 1:
            over = f"{dimension.label} {dimension.size} over tp={serving.tp} / ep={serving.ep}"
        if dimension.size % dimension.ranks:
            problem = f"{over} does not divide"
        elif dimension.size // dimension.ranks % dimension.multiple:
            piece = dimension.size // dimension.ranks
            problem = f"{over} gives {piece} per rank, not a multiple of {dimension.multiple}"
        else:
            continue
        hint = _rank_hint(info, dimension, serving)
        yield Finding(code="TC-111", where=f"--tp {serving.tp}", message=problem, hint=hint)


def _dimensions(info: ModelInfo, choices: Choices, serving: Serving) -> Iterator[_Dimension]:
    """Input widths of row-parallel matrices; the columns of gate/up and q/k/v are the same widths.

    Where layers have different formats, a piece must suit all of them.
    """
    down = info.family.gate_up_down[2]
    labels = {
        Role.ROUTED_EXPERT: info.family.moe_intermediate_key,
        Role.SHARED_EXPERT: "shared expert intermediate size",
        Role.DENSE_MLP: "intermediate_size",
        Role.ATTENTION: "num_attention_heads x head_dim",
    }
    multiples: dict[tuple[Role, int], int] = {}
    for linear in info.linears:
        role = linear.part.role
        if role not in QUANTIZABLE or linear.part.projection not in (down, "down_proj", "o_proj", "out_proj"):
            continue
        found, key = choices.format_of(linear), (role, linear.in_features)
        # A block whose last scale covers fewer elements can be stored, but not cut between two ranks.
        multiple = lcm(found.in_multiple, found.out_multiple, found.group_size or 1) if found else 1
        multiples[key] = lcm(multiple, multiples.get(key, 1))
    for (role, size), multiple in multiples.items():
        yield _Dimension(
            label=labels[role],
            size=size,
            ranks=moe_tp(serving) if role is Role.ROUTED_EXPERT else serving.attention_tp,
            multiple=multiple,
            role=role,
        )


def _rank_hint(info: ModelInfo, dimension: _Dimension, serving: Serving) -> str:
    def fits(ranks: int) -> bool:
        return dimension.size % ranks == 0 and dimension.size // ranks % dimension.multiple == 0

    choices = []
    smaller = next((tp for tp in range(serving.tp - 1, 0, -1) if serving.tp % tp == 0 and fits(tp)), None)
    if smaller:
        choices.append(f"--tp {smaller} ({dimension.size // smaller})")
    if dimension.role is Role.ROUTED_EXPERT:
        for ep in range(serving.tp, serving.ep, -1):
            if serving.tp % ep == 0 and info.num_experts % ep == 0 and fits(serving.tp // ep):
                choices.append(f"--ep {ep}")
                break
    elif info.is_moe and not serving.attention_dp:
        choices.append("--attention-dp, which leaves this part whole")
    if not choices:
        return "use a format with smaller groups, or leave this part out with --policy"
    return f"use {' or '.join(choices)}"
