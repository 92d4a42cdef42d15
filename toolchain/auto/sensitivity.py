"""KL(source || quantized) on held-out windows when only one layer group is quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from toolchain.auto.groups import Group, choices_of
from toolchain.auto.held_out import HeldOut
from toolchain.auto.shipped import Shipped, ship
from toolchain.auto.tail import Tail
from toolchain.core.environment import package_versions
from toolchain.core.progress import Progress, Silent
from toolchain.evaluate.perplexity import vocab_size_of
from toolchain.evaluate.windows import fitting_batch_size
from toolchain.formats import get_format
from toolchain.modeling.loading import load_source, pick_device
from toolchain.models.reader import resolve_model
from toolchain.models.types import ModelInfo
from toolchain.plan.choices import Choices
from toolchain.plan.types import Plan

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Score:
    """One group in one format."""

    group: str
    """``3.attention.q_proj+k_proj+v_proj``, ``3.routed_expert``: layer, role and, where not all, projections."""
    role: str
    layer: int | None
    projections: tuple[str, ...]
    format: str
    modules: int
    parameters: int
    stored_bytes: int
    """Of its matrices in this format, scales included."""
    kl: float
    """Mean over held-out tokens, in nats."""
    kl_stderr: float | None
    """Standard error of ``kl`` over windows; None for a single window."""
    bits_saved: float
    """By how much the effective bits per parameter of the whole checkpoint fall."""
    kl_per_bit: float | None
    """``kl / bits_saved``: the price of a bit here. None where nothing is saved."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """All groups of a model, the most sensitive first. ``to_json`` is what ``toolchain sensitivity --json`` prints."""

    model: str
    model_identity: str
    formats: tuple[str, ...]
    policy: str
    recipes: dict[str, str]
    """Format -> recipe that chose its scales and codes."""
    parameters: int
    source_bits: float
    """Bits per parameter of the source."""
    held_out: dict[str, Any]
    calibration: dict[str, Any]
    scores: tuple[Score, ...]
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    info: ModelInfo,
    plans: Sequence[Plan],
    groups: Sequence[Group],
    held: HeldOut,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Score]:
    """The score of every group in the format that each of ``plans`` gives it, in the order of the model.

    Each plan is calibrated once, with every group quantized; then one group after the other is put into the
    unquantized model. In memory: that model, and the packed matrices of all plans on the CPU.
    """
    progress = progress or Silent()
    shipped = [
        ship(plan, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress)
        for plan in plans
    ]
    target = pick_device(device)
    source = resolve_model(plans[0].model)
    model = load_source(source, device=target, dtype=dtype, trust_remote_code=trust_remote_code)
    size = fitting_batch_size(held.windows.shape[1], vocab_size_of(model))
    tail = Tail(model, [batch.to(target) for batch in held.windows.split(size)])
    by_layer: dict[int, list[Group]] = {}
    for group in groups:
        by_layer.setdefault(len(tail) if group.layer is None else group.layer, []).append(group)
    chosen = [choices_of(info, plan) for plan in plans]
    scores = []
    for layer in progress.track(tail, description="sensitivity, by layer", total=len(tail) + 1):
        for group in by_layer.get(layer, ()):
            for item, choices in zip(shipped, chosen, strict=True):
                if item.holds(group):
                    with item.put(model, group):
                        scores.append(_score(info, choices, group, item, tail.kl()))
    return scores


def _score(info: ModelInfo, choices: Choices, group: Group, shipped: Shipped, kl: torch.Tensor) -> Score:
    """``kl``: [windows, tokens]."""
    name = shipped.formats[shipped.family.to_module(group.modules[0])]
    stored = group.stored_bytes(info, get_format(name), choices)
    saved = (group.source_bytes - stored) * 8 / info.parameters
    mean = float(kl.mean())
    return Score(
        group=group.name,
        role=group.role.value,
        layer=group.layer,
        projections=group.projections,
        format=name,
        modules=len(group.linears),
        parameters=group.parameters,
        stored_bytes=stored,
        kl=mean,
        kl_stderr=standard_error(kl.mean(dim=1)),
        bits_saved=saved,
        kl_per_bit=mean / saved if saved > 0 else None,
    )


def standard_error(values: torch.Tensor) -> float | None:
    """Of the mean of [n] values; None for fewer than two."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def report(info: ModelInfo, plans: Sequence[Plan], scores: Sequence[Score], held: HeldOut) -> Sensitivity:
    """The scores with all that they depend on, the largest KL first."""
    first = plans[0]
    calibration = asdict(first.calibration)
    return Sensitivity(
        model=first.model,
        model_identity=first.model_identity,
        formats=tuple(plan.format for plan in plans),
        policy=first.policy,
        recipes={plan.format: plan.recipe for plan in plans},
        parameters=info.parameters,
        source_bits=info.bytes * 8 / info.parameters,
        held_out=held.identity,
        calibration={
            key: calibration[key] for key in ("data", "samples", "length_tokens", "seed", "mode", "sampling")
        },
        scores=tuple(sorted(scores, key=lambda score: -score.kl)),
        versions=package_versions(),
    )
