"""A Policy says which roles get the format; PolicyOptions say where a plan departs from it.

Routers, norms and embeddings are in no policy, and no option, recipe or optimiser can put them there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from toolchain.core.errors import UsageError
from toolchain.core.lookup import pick
from toolchain.core.roles import Role
from toolchain.formats.base import Format


@dataclass(frozen=True, kw_only=True)
class Policy:
    name: str
    title: str
    roles: tuple[Role, ...]
    """Roles that get the main format; a subset of ``toolchain.core.roles.QUANTIZABLE``."""


EXPERTS_ONLY = Policy(
    name="experts-only",
    title="routed experts: most of the parameters, least of the risk; shared experts FP8 beside 4-bit formats",
    roles=(Role.ROUTED_EXPERT,),
)
MLP_ONLY = Policy(
    name="mlp-only",
    title="routed experts, shared experts and dense MLPs; attention keeps the source dtype",
    roles=(Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP),
)
ALL_LINEAR = Policy(
    name="all-linear",
    title="every linear layer of the decoder: MLPs and attention",
    roles=(Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP, Role.ATTENTION),
)
POLICIES: tuple[Policy, ...] = (EXPERTS_ONLY, MLP_ONLY, ALL_LINEAR)

CUSTOM = Policy(name="custom", title="part by part, as a recipe file or an optimiser chose", roles=())
"""Not a choice of users: everything keeps its dtype except what the overrides of the plan say."""

KEPT: dict[Role, str] = {
    Role.ROUTER: "routers and gates decide where tokens go: they keep the source dtype",
    Role.NORM: "norms are small and sensitive: they keep the source dtype",
    Role.EMBEDDING: "embeddings are looked up, not multiplied: they keep the source dtype",
    Role.LM_HEAD: "lm_head is sensitive, and most runtimes expect it in the source dtype; --lm-head says otherwise",
    Role.OTHER: "outside of the decoder's matmuls (vision tower, multi-token prediction, sinks): kept",
}
"""Why each role that no policy quantizes is left alone."""

CHOICES: dict[str, tuple[str, ...]] = {
    "attention": ("default", "bf16", "fp8", "same"),
    "shared_experts": ("default", "bf16", "fp8", "same"),
    "lm_head": ("bf16", "fp8", "same"),
}
"""Values of the options: ``bf16`` is the dtype of the source, whatever it is; ``same`` is the main format."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """Departures from a policy. UsageError TC-158 for values that do not exist."""

    attention: str = "default"
    shared_experts: str = "default"
    lm_head: str = "bf16"
    """Quantized only when asked for."""
    protect_first: int | None = None
    """Decoder layers from the first one on that keep the source dtype whole, experts included. None: the dense layers
    before the first MoE layer, when the main format has 4 bits; otherwise none."""
    protect_last: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"--{name.replace('_', '-')} is {getattr(self, name)!r} (expected {', '.join(known)})"
            for name, known in CHOICES.items()
            if getattr(self, name) not in known
        ]
        problems += [
            f"--{name.replace('_', '-')} is {value} (expected at least 0)"
            for name in ("protect_first", "protect_last")
            if (value := getattr(self, name)) is not None and value < 0
        ]
        if problems:
            raise UsageError("; ".join(problems), hint="`toolchain plan --help` lists them", code="TC-158")

    @property
    def said(self) -> dict[str, object]:
        """The options that are not at their defaults."""
        values = {item.name: (getattr(self, item.name), item.default) for item in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}


def get_policy(name: str) -> Policy:
    """The policy called ``name``; UsageError lists the alternatives."""
    hint = "leave it out for the format's own default"
    return pick(POLICIES, name, kind="policy", hint=hint, code="TC-104")


def default_policy(format: Format, *, is_moe: bool) -> Policy:
    """The format's choice for a mixture of experts; every linear layer for a dense model."""
    return get_policy(format.moe_default_policy) if is_moe else ALL_LINEAR
