"""A Policy says which roles get the format. Routers, norms, embeddings and lm_head are in none of them."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.core.lookup import pick
from toolchain.core.roles import Role
from toolchain.formats.base import Format


@dataclass(frozen=True, kw_only=True)
class Policy:
    name: str
    title: str
    roles: tuple[Role, ...]
    """Roles that are quantized; a subset of ``toolchain.core.roles.QUANTIZABLE``."""


EXPERTS_ONLY = Policy(
    name="experts-only",
    title="routed experts only: most of the parameters, least of the risk",
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

NOTHING = Policy(name="nothing", title="every part keeps the source dtype", roles=())
"""Not a choice of users: what a target holds in memory that decodes its weights."""

KEPT: dict[Role, str] = {
    Role.ROUTER: "routers and gates decide where tokens go: they keep the source dtype",
    Role.NORM: "norms are small and sensitive: they keep the source dtype",
    Role.EMBEDDING: "embeddings are looked up, not multiplied: they keep the source dtype",
    Role.LM_HEAD: "lm_head is sensitive, and runtimes expect it in the source dtype",
    Role.OTHER: "outside of the decoder's matmuls (vision tower, multi-token prediction, sinks): kept",
}
"""Why each role that no policy quantizes is left alone."""


def get_policy(name: str) -> Policy:
    """The policy called ``name``; UsageError lists the alternatives."""
    hint = "leave it out for the format's own default"
    return pick(POLICIES, name, kind="policy", hint=hint, code="TC-104")


def default_policy(format: Format, *, is_moe: bool) -> Policy:
    """The format's choice for a mixture of experts; every linear layer for a dense model."""
    return get_policy(format.moe_default_policy) if is_moe else ALL_LINEAR
