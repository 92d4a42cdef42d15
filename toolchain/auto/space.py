"""The search space of mixed precision: which group may have which format, and its bytes. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from toolchain.auto.candidates import AUTO, Auto, candidate_formats, main_of, refuse_mixing, unsupported
from toolchain.auto.cost import Cost, cost_of
from toolchain.auto.groups import Group, choices_of, find_groups
from toolchain.core.errors import UsageError
from toolchain.core.findings import errors
from toolchain.core.roles import Role
from toolchain.formats import get_format
from toolchain.formats.base import Format
from toolchain.models.types import LinearInfo, ModelInfo
from toolchain.plan.planner import PlanRefused, make_plan
from toolchain.plan.policy import ALL_LINEAR
from toolchain.plan.types import SOURCE_DTYPE, Plan
from toolchain.recipes import Recipe, get_recipe


@dataclass(frozen=True, kw_only=True)
class Space:
    info: ModelInfo
    auto: Auto
    main: Format
    """Decides the recipe and what the policy protects by default."""
    formats: tuple[str, ...]
    groups: tuple[Group, ...]
    options: dict[str, dict[str, int]] = field(repr=False)
    """Group name -> format name or ``source`` -> bytes on disk, the smallest first."""
    cost: Cost
    fixed_cost: int
    """Weighted bytes of everything that is no group."""
    arguments: dict[str, Any] = field(repr=False)
    """Of ``make_plan``, without format and overrides."""

    @property
    def least_bits(self) -> float:
        return self.bits_of(self.smallest())

    @property
    def most_bits(self) -> float:
        return self.bits_of({name: list(sizes)[-1] for name, sizes in self.options.items()})

    def bits_of(self, chosen: Mapping[str, str]) -> float:
        """Bits per parameter, as the budget counts them, when each group (by name) has its format."""
        weighted = self.weighted_options()
        return self.cost.bits(self.fixed_cost + sum(weighted[name][item] for name, item in chosen.items()))

    def bits_of_plan(self, plan: Plan) -> float:
        return self.cost.bits(self.cost.of_plan(plan))

    def weighted_options(self) -> dict[str, dict[str, int]]:
        """``options`` in the units of the budget."""
        return {
            group.name: {
                name: self.cost.weight(group.role) * size for name, size in self.options[group.name].items()
            }
            for group in self.groups
        }

    @property
    def out_of_reach(self) -> str:
        """Why the budget makes no sense for this model; empty when it does."""
        asked, source = f"--bits {self.auto.bits:g}", self.info.bytes * 8 / self.info.parameters
        if self.auto.bits >= source:
            return f"{asked} asks for nothing: the source has {source:.2f} bits per parameter"
        if self.budget < self.cost.of_plan(self.plan(self.smallest())) - self.fixed_cost:
            what = "what a token reads" if self.auto.cost == "active_moe" else "the whole checkpoint"
            return (
                f"{asked} cannot be reached: with {', '.join(self.formats)} and policy {self.arguments['policy']} "
                f"{what} has at least {self.least_bits:.3f} bits per parameter (and at most {self.most_bits:.3f})"
            )
        return ""

    @property
    def reach_hint(self) -> str:
        least = -(-self.least_bits * 1000 // 1) / 1000
        return f"use --bits {least:.3f} or more, a wider --policy, fewer protected layers or narrower --auto-formats"

    @property
    def budget(self) -> int:
        """Weighted bytes that are left for the groups."""
        return int(self.auto.bits * self.cost.parameters / 8) - self.fixed_cost

    def plan(self, chosen: Mapping[str, str]) -> Plan:
        """The plan in which each group (by name) has its format."""
        return _plan(self.info, self.main, self.groups, chosen, self.arguments)

    def plan_of(self, format_name: str) -> Plan:
        """``format_name`` wherever it is an option, and nothing else quantized of what is searched: to measure with."""
        return self.plan(
            {
                name: format_name if format_name in sizes else SOURCE_DTYPE
                for name, sizes in self.options.items()
            }
        )

    def smallest(self) -> dict[str, str]:
        return {name: next(iter(sizes)) for name, sizes in self.options.items()}

    def uniform(self, format_name: str) -> Plan | None:
        """What ``--format format_name`` makes of the same request; None when it is refused."""
        arguments = self.arguments
        if format_name != self.main.name:
            arguments = {**arguments, "recipe": None}
        plan = make_plan(self.info, format=format_name, **arguments)
        return None if errors(plan.findings) else plan


def find_space(info: ModelInfo, auto: Auto, **arguments: Any) -> Space:
    """Groups that the policy quantizes and no option fixes, with the candidates that they fit and the target runs.

    ``arguments``: those of ``make_plan``, without format and overrides. Raises UsageError TC-170 for candidates that
    cannot be searched together, PlanRefused for those that the target does not run.
    """
    arguments = {**arguments, "policy": arguments.get("policy") or ALL_LINEAR.name}
    found = candidate_formats(info, auto, arguments)
    main = main_of(found)
    _require_apart(get_recipe(arguments.get("recipe"), main))
    base = make_plan(info, format=main.name, **arguments)
    groups = find_groups(info, _open(info, base))
    allowed = {group.name: tuple(_allowed(info, group, found, arguments)) for group in groups}
    unused = [item for item in found if not any(item.name in names for names in allowed.values())]
    if unused and groups:
        raise PlanRefused(
            f"no part of the model can be {unused[0].name} for {base.target} on {base.gpu}",
            tuple(unsupported(info, unused[0], groups, arguments)),
            hint="leave it out of --auto-formats; `toolchain support` shows what runs",
            code="TC-170",
        )
    if len(found) > 1:
        refuse_mixing(info, arguments)
    options = _weigh(info, main, groups, allowed, arguments)
    cost = cost_of(info, auto.cost)
    smallest = {name: next(iter(sizes)) for name, sizes in options.items()}
    least = sum(cost.weight(group.role) * options[group.name][smallest[group.name]] for group in groups)
    return Space(
        info=info,
        auto=auto,
        main=main,
        formats=tuple(item.name for item in found),
        groups=groups,
        options=options,
        cost=cost,
        fixed_cost=cost.of_plan(_plan(info, main, groups, smallest, arguments)) - least,
        arguments=arguments,
    )


def _require_apart(recipe: Recipe) -> None:
    """UsageError TC-170 for a recipe that ties matrices together which the search looks at one by one."""
    if recipe.on("order"):
        raise UsageError(
            f"recipe {recipe.name}: arrange moves channels of gate, up and down together, which the search rounds "
            f"apart",
            hint="leave arrange out of --recipe, or choose one --format",
            code="TC-170",
        )


def _open(info: ModelInfo, base: Plan) -> Iterator[LinearInfo]:
    """Matrices whose format is free: what policy and options quantize without naming FP8."""
    choices = choices_of(info, base)
    for linear, _ in choices.quantized(info):
        decided = choices.of(linear.part).source
        if not (decided.startswith("--") and decided.endswith(" fp8")):
            yield linear


def _allowed(
    info: ModelInfo, group: Group, formats: tuple[Format, ...], arguments: dict[str, Any]
) -> Iterator[str]:
    for item in formats:
        if group.fits(item) and not list(unsupported(info, item, (group,), arguments)):
            yield item.name
    if group.role is not Role.ROUTED_EXPERT:
        yield SOURCE_DTYPE


def _weigh(
    info: ModelInfo,
    main: Format,
    groups: tuple[Group, ...],
    allowed: dict[str, tuple[str, ...]],
    arguments: dict[str, Any],
) -> dict[str, dict[str, int]]:
    """Bytes of every option, from plans in which all groups have it: groups do not change each other's bytes."""
    sizes: dict[str, dict[str, int]] = {group.name: {} for group in groups}
    names = dict.fromkeys(name for found in allowed.values() for name in found)
    for name in names:
        having = [group for group in groups if name in allowed[group.name]]
        if name == SOURCE_DTYPE:
            for group in having:
                sizes[group.name][name] = group.source_bytes
            continue
        plan = _plan(
            info, main, tuple(having), dict.fromkeys((item.name for item in having), name), arguments
        )
        choices = choices_of(info, plan)
        for group in having:
            sizes[group.name][name] = group.stored_bytes(info, get_format(name), choices)
    for group in groups:
        if not sizes[group.name]:  # experts that fit no candidate stay as they are; the plan warns of them
            sizes[group.name][SOURCE_DTYPE] = group.source_bytes
    by_size = partial(sorted, key=lambda item: item[1])
    return {name: dict(by_size(found.items())) for name, found in sizes.items()}


def _plan(
    info: ModelInfo,
    main: Format,
    groups: tuple[Group, ...],
    chosen: Mapping[str, str],
    arguments: dict[str, Any],
) -> Plan:
    overrides = [
        group.override(
            chosen[group.name],
            source=AUTO,
            reason=f"chosen by the search ({chosen[group.name]})",
        )
        for group in groups
    ]
    return make_plan(info, format=main.name, overrides=overrides, **arguments)
