"""From what a model calls itself, and what its tensors are called, to its Family."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.roles import Role
from toolchain.families.base import Family
from toolchain.families.generic import GENERIC, GENERIC_MOE

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""config.json keys that hold the number of routed experts in the families of transformers 5."""

_MISSING_EXAMPLES = 6


def find_family(
    families: tuple[Family, ...],
    model_type: str,
    architecture: str,
    tensor_names: Iterable[str],
    *,
    config: Mapping[str, Any] | None = None,
) -> Family:
    """The declared family, else the generic rule, else one UsageError that says what was and was not
    recognised.

    ``tensor_names`` are checkpoint names, with or without ``.weight``. ``config`` lets the generic rule find
    the keys for the number and the size of experts.
    """
    for family in families:
        if architecture in family.architectures or model_type in family.model_types:
            return family
    names = sorted(tensor_names)
    for family in GENERIC:
        if _explains(family, names):
            return _with_keys(family, config or {})
    raise _unknown(model_type, architecture, names)


def is_generic(family: Family) -> bool:
    """True when nobody has declared this model's type and the generic rule stepped in."""
    return any(family.name == candidate.name for candidate in GENERIC)


def _explains(family: Family, names: list[str]) -> bool:
    """Every matrix of every layer has a role, attention is there, and routers and experts are, or are not."""
    parts = {name: family.classify(name) for name in names}
    in_layers = [part for name, part in parts.items() if name.endswith(".weight") and part.layer is not None]
    roles = {part.role for part in in_layers}
    projections = {part.projection for part in in_layers if part.role is Role.ROUTED_EXPERT}
    if Role.OTHER in roles or Role.ATTENTION not in roles:
        return False
    if family.num_experts_key is None:
        sparse = {Role.ROUTER, Role.ROUTED_EXPERT, Role.SHARED_EXPERT} & roles
        return not sparse and Role.DENSE_MLP in roles and not any("expert" in name for name in names)
    return {Role.ROUTER, Role.ROUTED_EXPERT} <= roles and projections == set(family.gate_up_down)


def _with_keys(family: Family, config: Mapping[str, Any]) -> Family:
    if family.num_experts_key is None:
        return family
    count = next((key for key in EXPERT_COUNT_KEYS if key in config), family.num_experts_key)
    size = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    return replace(family, num_experts_key=count, moe_intermediate_key=size)


def _unknown(model_type: str, architecture: str, names: list[str]) -> UsageError:
    parts = {name: GENERIC_MOE.classify(name) for name in names}
    counts = Counter(part.role.value for part in parts.values() if part.role is not Role.OTHER)
    recognised = ", ".join(f"{count} {role}" for role, count in sorted(counts.items())) or "nothing"
    # One example per shape of name: layers and experts differ only in their numbers.
    strange = {
        re.sub(r"\.\d+\.", ".N.", name): name for name, part in parts.items() if part.role is Role.OTHER
    }
    shown = list(strange.values())[:_MISSING_EXAMPLES]
    rest = f" and {len(strange) - len(shown)} more kinds" if len(strange) > len(shown) else ""
    missing = f"not recognised: {', '.join(shown)}{rest}" if shown else "which do not make a decoder"
    return UsageError(
        f"unknown architecture {architecture!r} (model_type {model_type!r}): of {len(names)} tensors, "
        f"recognised {recognised}; {missing}",
        hint="declare the family: one file in toolchain/families, one entry in FAMILIES (see CONTRIBUTING)",
        code="TC-020",
    )
