"""The student: a calibrated model in memory whose weights can be trained while it computes on quantized ones.

Calibrated in the dtype of the source, exactly as without training, and then held in float32: before the first step it
computes what a checkpoint of the same plan without training computes. Ranges that packing takes from the weights follow
the current weights in every forward (``quantize.current_ranges``); those that the plan keeps stay as calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress, Silent
from toolchain.families import Family
from toolchain.plan.types import Plan
from toolchain.quantize import current_ranges
from toolchain.quantize.job import calibrate
from toolchain.quantize.quantizers import planned_modules


@dataclass(frozen=True, kw_only=True)
class Student:
    """A fake-quantized model in memory, ready to train. The model is changed in place; the rest says what it is."""

    model: nn.Module
    """transformers CausalLM, experts unfused, float32; every Linear of ``modules`` has ModelOpt's quantizers."""
    plan: Plan
    family: Family
    source: Path
    """Directory of the unquantized model, whose names, dtypes and side files the trained one gets."""
    modules: dict[str, str]
    """Module path -> format name, of every quantized Linear."""
    folded_norms: frozenset[str] = frozenset()
    """Module paths of norms that took a channel scale of their consumers."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the recipe did, as the manifest tells it."""
    coverage: dict[str, Any] | None = None
    """``coverage.json`` of calibration; None when no expert was counted."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Of calibration, as ``quantize.json`` has it before files are written; ``details`` are in it."""


def make_student(
    plan: Plan,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Student:
    """Calibrate ``plan.model`` from scratch. ToolchainError TC-250 when the recipe chose codes or scales already."""
    progress = progress or Silent()
    done = calibrate(plan, device=device, trust_remote_code=trust_remote_code, progress=progress)
    applied = done.exporter.applied
    if applied.packed:
        raise ToolchainError(
            f"recipe {plan.recipe} chose the codes or scales of {len(applied.packed)} matrices after calibration, so "
            f"training could not change them",
            hint="train under --recipe max, or one of transforms and input scales alone (awq, smoothquant, headroom)",
            code="TC-250",
        )
    family = done.exporter.family
    student = Student(
        model=in_float32(done.model),
        plan=plan,
        family=family,
        source=done.exporter.source,
        modules=planned_modules(done.model, plan, family),
        folded_norms=frozenset(applied.folded_norms),
        details=applied.details,
        coverage=done.coverage,
        manifest=done.manifest,
    )
    current_ranges.follow(student.model, student.modules)
    return student


def in_float32(model: nn.Module) -> nn.Module:
    """``model`` with every floating tensor in float32, each parameter with memory of its own.

    Unfused experts of a float32 source are views of one tensor, which neither an optimizer that shards nor safetensors
    can take apart.
    """
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.untyped_storage().nbytes() != parameter.nbytes:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def save_start(student: Student, directory: Path) -> None:
    """Write what ``load_start`` needs into ``directory``: quantizers, and weights that calibration changed."""
    raise NotImplementedError


def load_start(
    plan: Plan,
    directory: Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Student:
    """The student that ``save_start`` wrote, bit for bit, without calibrating."""
    raise NotImplementedError
