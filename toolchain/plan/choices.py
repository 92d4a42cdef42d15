"""Which format each part of the decoder gets, and why: the policy, its options, and what overrides both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from toolchain.core.roles import ASSIGNABLE, QUANTIZABLE, Role
from toolchain.families.base import Part
from toolchain.formats import get_format
from toolchain.formats.base import Format
from toolchain.models.types import LinearInfo, ModelInfo
from toolchain.plan.policy import CUSTOM, EXPERTS_ONLY, KEPT, Policy, PolicyOptions
from toolchain.plan.types import SOURCE_DTYPE, Plan
from toolchain.targets.base import Target

HARD_RULE = "hard rule"
"""``source`` of what nobody can change."""

SHARED_FP8 = (
    "default of experts-only, as NVIDIA's Nemotron-3-Super recipe (modelopt_recipes) and GLM-5.2 have it"
)


@dataclass(frozen=True, kw_only=True)
class Choice:
    format: Format | None
    """None keeps the dtype of the source."""
    reason: str
    source: str
    """The rule, option or document that decided."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """One decision of a recipe file or an optimiser. It wins over the policy, and never over a hard rule."""

    role: Role
    layer: int | None
    """None only for lm_head."""
    format: str
    """A format name, or ``source``."""
    source: str
    """What decided, for the plan and for errors: a recipe and its pattern, or a search."""
    projections: tuple[str, ...] = ()
    """Projections that it speaks about, such as ``("o_proj",)``; empty: all of this role in this layer."""
    reason: str = ""


@dataclass(frozen=True)
class Choices:
    """(role, layer, projection) -> Choice, for every matrix that a plan may quantize."""

    by_part: dict[tuple[Role, int | None, str], Choice]

    def of(self, part: Part) -> Choice:
        """The decision about a part of the decoder; parts that no plan may quantize are kept by a hard rule."""
        layer = part.layer if part.role in QUANTIZABLE else None
        found = self.by_part.get((part.role, layer, part.projection)) or self.by_part.get(
            (part.role, layer, "")
        )
        return found or Choice(format=None, reason=KEPT.get(part.role, "nothing decided"), source=HARD_RULE)

    def format_of(self, linear: LinearInfo) -> Format | None:
        return self.of(linear.part).format

    def quantized(self, info: ModelInfo) -> Iterator[tuple[LinearInfo, Format]]:
        """Every matrix that gets a format, with it."""
        for linear in info.linears:
            found = self.format_of(linear)
            if found is not None:
                yield linear, found


def held(choices: Choices, target: Target, sm: int) -> Choices:
    """What ``target`` holds in the memory of a GPU: parts whose weights it decodes have the dtype of the source."""
    return Choices(
        {
            part: choice
            for part, choice in choices.by_part.items()
            if choice.format is not None and target.keeps(choice.format.name, sm)
        }
    )


def choose(
    info: ModelInfo,
    format: Format,
    policy: Policy,
    options: PolicyOptions | None = None,
    overrides: Iterable[Override] = (),
    *,
    mixes: bool = True,
) -> Choices:
    """The decision for every matrix of ``info``.

    ``mixes`` says whether the target runs FP8 beside the main format: else nothing becomes FP8 by default.
    Overrides of parts that do not exist or must be kept are left out here; ``rules.policy_findings`` names them.
    """
    rules = _Rules(info, format, policy, options or PolicyOptions(), mixes)
    asked: dict[tuple[Role, int | None, str], Override] = {}
    for item in overrides:
        for projection in item.projections or ("",):
            asked[item.role, item.layer, projection] = item
    found: dict[tuple[Role, int | None, str], Choice] = {}
    for linear in info.linears:
        part = linear.part
        if part.role not in ASSIGNABLE:
            continue
        layer = part.layer if part.role in QUANTIZABLE else None
        key = (part.role, layer, part.projection)
        if key in found:
            continue
        override = asked.get(key) or asked.get((part.role, layer, ""))
        found[key] = _overridden(override) if override else rules.choice(part.role, layer)
        # Tensors of no single projection, such as all experts of a layer in one, go with the first of their part.
        found.setdefault((part.role, layer, ""), found[key])
    return Choices(found)


def _overridden(item: Override) -> Choice:
    chosen = None if item.format == SOURCE_DTYPE else get_format(item.format)
    reason = item.reason or ("chosen for this part" if chosen else "left in the source dtype")
    return Choice(format=chosen, reason=reason, source=item.source)


def overrides_of(plan: Plan) -> tuple[Override, ...]:
    """The decisions of a plan that was made, to be made again as they are."""
    return tuple(
        Override(
            role=Role(item.role),
            layer=item.layer,
            projections=item.projections,
            format=item.format,
            source=item.source,
            reason=item.reason,
        )
        for item in plan.assignments
        if Role(item.role) in ASSIGNABLE
    )


def protected_layers(info: ModelInfo, format: Format, options: PolicyOptions) -> dict[int, str]:
    """Layer -> the rule that keeps all of it in the source dtype."""
    total, found = info.num_hidden_layers, {}
    if options.protect_first is not None:
        found = dict.fromkeys(
            range(min(options.protect_first, total)), f"--protect-first {options.protect_first}"
        )
    elif info.is_moe and is_four_bit(format):
        found = dict.fromkeys(
            range(lead_dense_layers(info)), "default: dense layers before the first MoE layer"
        )
    last = range(max(0, total - options.protect_last), total)
    return found | dict.fromkeys(last, f"--protect-last {options.protect_last}")


def lead_dense_layers(info: ModelInfo) -> int:
    """Decoder layers before the first one with routed experts: ``first_k_dense_replace``, read from the tensors."""
    layers = [item.part.layer for item in info.by_role(Role.ROUTED_EXPERT) if item.part.layer is not None]
    return min(layers, default=0)


def is_four_bit(format: Format) -> bool:
    return format.weight_bits == 4


def is_fp8_like(format: Format) -> bool:
    """Eight bits of E4M3, in whatever granularity."""
    return format.weight_bits == 8 and any(
        item.suffix == "weight" and item.dtype == "F8_E4M3" for item in format.stored
    )


def fp8_beside(format: Format) -> Format:
    """What ``fp8`` means in an option: the main format when it is FP8 of any kind, else FP8 per tensor."""
    return format if is_fp8_like(format) else get_format("fp8")


class _Rules:
    """The policy and its options, asked role by role and layer by layer."""

    def __init__(
        self, info: ModelInfo, format: Format, policy: Policy, options: PolicyOptions, mixes: bool
    ) -> None:
        self.info, self.format, self.policy, self.options = info, format, policy, options
        self.protected = {} if policy is CUSTOM else protected_layers(info, format, options)
        self.mixes = mixes
        self.fp8_by_default = policy is EXPERTS_ONLY and info.is_moe and is_four_bit(format)
        self.shares = _shares(info)

    def choice(self, role: Role, layer: int | None) -> Choice:
        if layer is not None and layer in self.protected:
            reason = "protected: all of the layer keeps the source dtype"
            return Choice(format=None, reason=reason, source=self.protected[layer])
        option = {
            Role.ATTENTION: ("--attention", self.options.attention),
            Role.SHARED_EXPERT: ("--shared-experts", self.options.shared_experts),
            Role.LM_HEAD: ("--lm-head", self.options.lm_head),
        }.get(role, ("", "default"))
        if role is Role.LM_HEAD and option[1] == "bf16":
            return Choice(format=None, reason=KEPT[role], source="default")
        return self._default(role) if option[1] == "default" else self._option(role, *option)

    def _option(self, role: Role, name: str, value: str) -> Choice:
        chosen = {"bf16": None, "fp8": fp8_beside(self.format), "same": self.format}[value]
        what = "keeps the source dtype" if chosen is None else f"gets {chosen.name}"
        return Choice(
            format=chosen, reason=f"{what}, as asked ({self._held(role)})", source=f"{name} {value}"
        )

    def _default(self, role: Role) -> Choice:
        source, held = f"policy {self.policy.name}", self._held(role)
        if role in self.policy.roles:
            reason = f"policy {self.policy.name} quantizes this part ({held})"
            return Choice(format=self.format, reason=reason, source=source)
        if role is Role.SHARED_EXPERT and self.fp8_by_default and not self.mixes:
            reason = f"FP8 by default, but the target does not run it beside {self.format.name} here ({held})"
            return Choice(format=None, reason=reason, source="target")
        if role is Role.SHARED_EXPERT and self.fp8_by_default:
            reason = f"runs on every token: 8 bits beside 4-bit routed experts ({held})"
            return Choice(format=fp8_beside(self.format), reason=reason, source=SHARED_FP8)
        return Choice(
            format=None, reason=f"policy {self.policy.name} leaves out this part ({held})", source=source
        )

    def _held(self, role: Role) -> str:
        return f"{self.shares.get(role, 0.0):.1%} of the parameters"


def _shares(info: ModelInfo) -> dict[Role, float]:
    held: dict[Role, int] = {}
    for tensor in info.tensors:
        role = info.part(tensor.name).role
        held[role] = held.get(role, 0) + tensor.parameters
    return {role: count / info.parameters for role, count in held.items()}
