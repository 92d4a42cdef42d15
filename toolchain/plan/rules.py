"""Hard rules and consistency of what was decided, before anything is quantized: every violation at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from toolchain.core.errors import UsageError
from toolchain.core.findings import Finding
from toolchain.core.roles import ASSIGNABLE, QUANTIZABLE, Role
from toolchain.formats.base import Format
from toolchain.models.types import ModelInfo
from toolchain.plan.choices import Choice, Choices, Override, protected_layers
from toolchain.plan.policy import KEPT, Policy, PolicyOptions
from toolchain.plan.types import SOURCE_DTYPE, Plan

EXPERT_SHARE = 0.99
"""Share of routed-expert parameters, outside of protected layers, that must be quantized when experts are."""


def policy_findings(
    info: ModelInfo,
    choices: Choices,
    *,
    format: Format,
    policy: Policy,
    options: PolicyOptions,
    overrides: tuple[Override, ...] = (),
) -> Iterator[Finding]:
    """Everything that is wrong with who gets what, whoever decided it."""
    yield from _nothing(info, choices, policy, options)
    yield from _forbidden(info, overrides)
    yield from _options_without_effect(info, options)
    yield from _fused_siblings(info, choices)
    yield from _experts_of_a_layer(info, choices)
    yield from _expert_share(info, choices, protected_layers(info, format, options))


def require_allowed(plan: Plan) -> None:
    """UsageError TC-150 when a plan, perhaps edited by hand, gives a format to what must keep its dtype.

    A stage that works by module class would leave such a part alone, and the plan would not be what was done.
    """
    for item in plan.assignments:
        if item.format != SOURCE_DTYPE and item.role not in ASSIGNABLE:
            layer = f" of layer {item.layer}" if item.layer is not None else ""
            raise UsageError(
                f"the plan gives {item.format} to the {item.role}{layer}: {KEPT[Role(item.role)]}",
                hint="plan again: nothing may quantize this part",
                code="TC-150",
            )


def _nothing(info: ModelInfo, choices: Choices, policy: Policy, options: PolicyOptions) -> Iterator[Finding]:
    if next(choices.quantized(info), None) is not None:
        return
    names = ", ".join(role.value.replace("_", " ") for role in policy.roles)
    if not any(linear.part.role in policy.roles for linear in info.linears) and names:
        message = f"policy {policy.name} quantizes nothing: the model has no {names}"
        hint = "use --policy all-linear"
    else:
        said = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.said.items())
        message = f"policy {policy.name}{f' with {said}' if said else ''} leaves nothing to quantize"
        hint = "protect fewer layers"
    yield Finding(code="TC-142", where="--policy", message=message, hint=hint)


def _forbidden(info: ModelInfo, overrides: Iterable[Override]) -> Iterator[Finding]:
    """Overrides of what must be kept, and of what the model does not have."""
    present: set[tuple[Role, int | None, str]] = set()
    for linear in info.linears:
        layer = linear.part.layer if linear.part.role in QUANTIZABLE else None
        present |= {(linear.part.role, layer, linear.part.projection), (linear.part.role, layer, "")}
    kept: dict[tuple[str, Role, str], list[int | None]] = defaultdict(list)
    for item in overrides:
        part = f"{item.role.value}" + (f" of layer {item.layer}" if item.layer is not None else "")
        if item.role not in ASSIGNABLE:
            if item.format != SOURCE_DTYPE:
                kept[item.source, item.role, item.format].append(item.layer)
            continue
        missing = [name for name in item.projections or ("",) if (item.role, item.layer, name) not in present]
        if missing and not (item.role is Role.LM_HEAD and info.tied_embeddings):
            named = f"{', '.join(filter(None, missing))} of the " if any(missing) else ""
            yield Finding(
                code="TC-151",
                where=item.source,
                message=f"speaks about {named}{part}, which the model does not have",
                hint="`toolchain plan` lists the parts of each layer",
            )
    for (source, role, format), layers in kept.items():
        listed = ", ".join(str(layer) for layer in layers if layer is not None)
        where = f" of layers {listed}" if listed else ""
        yield Finding(
            code="TC-150",
            where=source,
            message=f"gives {format} to the {role.value}{where}: {KEPT[role]}",
            hint="take it out: nothing may quantize this part",
        )


def _options_without_effect(info: ModelInfo, options: PolicyOptions) -> Iterator[Finding]:
    if options.lm_head != "bf16" and (info.tied_embeddings or next(info.by_role(Role.LM_HEAD), None) is None):
        yield Finding(
            code="TC-156",
            where=f"--lm-head {options.lm_head}",
            message="lm_head shares the weight of the embedding, which is looked up and must keep its dtype",
            hint="leave --lm-head out",
        )
    if options.shared_experts != "default" and next(info.by_role(Role.SHARED_EXPERT), None) is None:
        yield Finding(
            code="TC-157",
            where=f"--shared-experts {options.shared_experts}",
            message="has no effect: the model has no shared experts",
            hint="leave it out",
            severity="warning",
        )


def _fused_siblings(info: ModelInfo, choices: Choices) -> Iterator[Finding]:
    """q/k/v, gate/up and MLA's down projections run as one matmul, in one format."""
    groups: dict[tuple[Role, int | None, tuple[str, ...]], dict[str, Choice]] = defaultdict(dict)
    for linear in info.linears:
        part = linear.part
        if part.role in QUANTIZABLE and part.role is not Role.ROUTED_EXPERT:
            key = (part.role, part.layer, info.family.fused_siblings(part.projection))
            groups[key][part.projection] = choices.of(part)
    for (role, layer, _), members in groups.items():
        if len({choice.format for choice in members.values()}) > 1:
            listed = "; ".join(f"{name} {_decided(choice)}" for name, choice in members.items())
            yield Finding(
                code="TC-152",
                where=f"{role.value} of layer {layer}",
                message=f"runtimes run these as one matmul, but they have several formats: {listed}",
                hint="give all of them one format",
            )


def _experts_of_a_layer(info: ModelInfo, choices: Choices) -> Iterator[Finding]:
    layers: dict[int | None, dict[str, Choice]] = defaultdict(dict)
    for linear in info.by_role(Role.ROUTED_EXPERT):
        layers[linear.part.layer][linear.part.projection] = choices.of(linear.part)
    for layer, members in layers.items():
        if len({choice.format for choice in members.values()}) > 1:
            listed = "; ".join(f"{name} {_decided(choice)}" for name, choice in members.items())
            yield Finding(
                code="TC-153",
                where=f"routed experts of layer {layer}",
                message=f"runtimes run all experts of a layer in one kernel, but they have several formats: {listed}",
                hint="give all experts of the layer, with all of their projections, one format",
            )


def _expert_share(info: ModelInfo, choices: Choices, protected: dict[int, str]) -> Iterator[Finding]:
    """Experts that were left out without being protected. Presets never do that; recipes and optimisers may."""
    sizes = {True: 0, False: 0}
    left: set[int | None] = set()
    for linear in info.by_role(Role.ROUTED_EXPERT):
        if linear.part.layer in protected:
            continue
        quantized = choices.format_of(linear) is not None
        sizes[quantized] += linear.parameters
        if not quantized:
            left.add(linear.part.layer)
    total = sum(sizes.values())
    if sizes[True] and sizes[True] / total < EXPERT_SHARE:
        layers = ", ".join(str(layer) for layer in sorted(left, key=lambda item: item or 0))
        yield Finding(
            code="TC-154",
            where="routed experts",
            message=f"{sizes[True] / total:.1%} of their parameters are quantized, expected at least "
            f"{EXPERT_SHARE:.0%}: layers {layers} keep the source dtype and no option protects them",
            hint="quantize their experts, or say --protect-first or --protect-last",
            severity="warning",
        )


def _decided(choice: Choice) -> str:
    return f"{choice.format.name if choice.format else SOURCE_DTYPE} ({choice.source})"
