"""Candidates of mixed precision: which formats may be searched together, and for which part. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolchain.auto.cost import COSTS
from toolchain.auto.groups import Group
from toolchain.core.errors import UsageError
from toolchain.core.findings import Finding, errors
from toolchain.core.gpus import get_gpu
from toolchain.core.roles import Role
from toolchain.formats import get_format, same_stored
from toolchain.formats.base import Format
from toolchain.models.types import ModelInfo
from toolchain.plan.planner import PlanRefused
from toolchain.plan.types import SOURCE_DTYPE
from toolchain.recipes import MAX
from toolchain.targets import get_target, parse_version
from toolchain.targets.base import PartKind, Target
from toolchain.targets.support import check_mixed, check_parts

AUTO = "auto"
MIXED = "mixed"
METHODS = ("sensitivity", "gradient", "kl_div")
"""How damage is scored: our own KL of each group, or ModelOpt's ``auto_quantize`` with either of its methods."""
DEFAULT_FORMATS = (("nvfp4", "fp8"), ("int4_awq", "fp8"), ("nvfp4",), ("int4_awq",), ("fp8",))
"""Candidates where none are named: the first set that the target runs for every part, in one checkpoint."""
SOURCE_NAMES = (SOURCE_DTYPE, "bf16")


@dataclass(frozen=True, kw_only=True)
class Auto:
    """What a user asks of the search. UsageError TC-170 for what makes no sense."""

    bits: float
    """Most effective bits per parameter, scales and unquantized parts included: of the whole checkpoint, or of what
    ``cost`` counts of it."""
    formats: tuple[str, ...] = ()
    """Candidates; the source dtype is always one, except for routed experts. Empty: ``DEFAULT_FORMATS``."""
    method: str = METHODS[0]
    cost: str = COSTS[0]

    def __post_init__(self) -> None:
        if not 0 < self.bits < 32:
            raise UsageError(
                f"--bits is {self.bits}, expected bits per parameter",
                hint="such as --bits 5.0; `toolchain plan` shows what can be reached",
                code="TC-170",
            )
        if self.method not in METHODS:
            raise UsageError(
                f"unknown --auto-method {self.method!r}; known: {', '.join(METHODS)}",
                hint="`toolchain quantize --help` describes them",
                code="TC-170",
            )
        if self.cost not in COSTS:
            raise UsageError(
                f"unknown --auto-cost {self.cost!r}; known: {', '.join(COSTS)}",
                hint="`toolchain quantize --help` describes them",
                code="TC-170",
            )


def candidate_formats(info: ModelInfo, auto: Auto, arguments: dict[str, Any]) -> tuple[Format, ...]:
    names = [name for name in dict.fromkeys(auto.formats) if name not in SOURCE_NAMES]
    if not names and auto.formats:
        raise UsageError(
            "--auto-formats names only the source dtype", hint="name at least one format", code="TC-170"
        )
    if not names:
        return _default_formats(info, arguments)
    found = tuple(get_format(name) for name in names)
    for index, item in enumerate(found):
        same = [other.name for other in found[:index] if same_stored(item, other)]
        if same:
            raise UsageError(
                f"{same[0]} and {item.name} are stored alike: the search cannot choose between them",
                hint="keep one of them in --auto-formats",
                code="TC-170",
            )
    return found


def _default_formats(info: ModelInfo, arguments: dict[str, Any]) -> tuple[Format, ...]:
    kinds: tuple[PartKind, ...] = ("moe", "dense") if info.is_moe else ("dense",)
    alone = bool(_mixing(info, *_runner(arguments)))
    for names in DEFAULT_FORMATS:
        found = tuple(get_format(name) for name in names)
        pairs = tuple((item, kind) for item in found for kind in kinds)
        refused = _support(arguments, pairs) or any(info.family.refusal(name) for name in names)
        if not refused and not (alone and len(found) > 1):
            return found
    return tuple(get_format(name) for name in DEFAULT_FORMATS[0])


def main_of(formats: tuple[Format, ...]) -> Format:
    """The narrowest, and of several the one whose name promises a recipe: a plan has one recipe."""
    main = min(formats, key=lambda item: (item.weight_bits, item.default_recipe == MAX))
    other = next((item for item in formats if item.default_recipe not in (MAX, main.default_recipe)), None)
    if other is not None:
        raise UsageError(
            f"{other.name} needs recipe {other.default_recipe}, {main.name} {main.default_recipe}: a plan has one",
            hint=f"leave {other.name} out of --auto-formats",
            code="TC-170",
        )
    return main


def unsupported(
    info: ModelInfo, format: Format, groups: tuple[Group, ...], arguments: dict[str, Any]
) -> Iterator[Finding]:
    """Why the target does not run ``format`` for these groups; storage of experts included."""
    kinds: dict[Role, PartKind] = {Role.ROUTED_EXPERT: "moe", Role.LM_HEAD: "lm_head"}
    wanted = dict.fromkeys((format, kinds.get(group.role, "dense")) for group in groups)
    yield from _support(arguments, tuple(wanted))
    if any(group.role is Role.ROUTED_EXPERT for group in groups):
        reason = info.family.refusal(format.name, arguments.get("target", "local"))
        if reason:
            message = f"experts of {info.family.name} cannot be stored as {format.name}: {reason}"
            yield Finding(code="TC-140", where="--auto-formats", message=message)


def _support(arguments: dict[str, Any], parts: tuple[tuple[Format, PartKind], ...]) -> list[Finding]:
    target, version = _runner(arguments)
    return errors(check_parts(target, version, get_gpu(arguments.get("gpu", "cpu")), parts))


def _runner(arguments: dict[str, Any]) -> tuple[Target, str]:
    target = get_target(arguments.get("target", "local"))
    return target, str(parse_version(arguments.get("target_version") or target.default_version))


def _mixing(info: ModelInfo, target: Target, version: str) -> list[Finding]:
    return errors(list(check_mixed(target, version, info.family.name, is_moe=info.is_moe)))


def refuse_mixing(info: ModelInfo, arguments: dict[str, Any]) -> None:
    """PlanRefused when the target loads only one format (beside the source dtype) in a checkpoint of this family."""
    target, version = _runner(arguments)
    found = _mixing(info, target, version)
    if found:
        raise PlanRefused(
            f"{target.name} {version} does not load several formats in one {info.family.name}",
            tuple(found),
            hint="name one format in --auto-formats (beside the source dtype), or use another target or release",
            code="TC-170",
        )
