"""The MoE backend of a plan, and reports against what it would run."""

from __future__ import annotations

from collections.abc import Iterator

from toolchain.core.findings import Finding
from toolchain.core.gpus import Gpu
from toolchain.formats.base import Format
from toolchain.models.types import ModelInfo
from toolchain.plan.types import Serving
from toolchain.targets.backends import Wish
from toolchain.targets.base import PartKind, Target
from toolchain.targets.known_bad import Case
from toolchain.targets.rows import Model
from toolchain.targets.support import check_backend, check_known_bad


def wish_of(serving: Serving) -> Wish:
    """What the plan asks of a MoE backend beside the format."""
    return Wish(
        backend=serving.moe_backend,
        ep=serving.ep,
        attention_dp=serving.attention_dp,
        eplb=serving.eplb_slots > 0,
    )


def backend_findings(
    info: ModelInfo,
    *,
    parts: tuple[tuple[Format, PartKind], ...],
    target: Target,
    version: str,
    gpu: Gpu,
    serving: Serving,
) -> Iterator[Finding]:
    """Whether a MoE backend does what is asked, and what is known to fail. ``parts``: the largest first."""
    experts = next((format for format, kind in parts if kind == "moe"), None)
    backend = ""
    if experts is not None:
        backend, found = check_backend(target, version, gpu, experts, wish_of(serving))
        yield from found
    kinds: dict[PartKind, Model] = {"dense": "dense", "moe": "moe"}
    case = Case(
        version=version,
        sm=gpu.sm,
        parts=tuple((format.name, kinds[kind]) for format, kind in parts if kind in kinds),
        family=info.family.name,
        is_moe=info.is_moe,
        backend=backend,
        experts=info.num_experts,
        ranks=serving.tp * serving.pp,
        ep=serving.ep,
    )
    yield from check_known_bad(target, gpu, case)
