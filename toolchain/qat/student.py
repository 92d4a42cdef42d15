"""The student: a calibrated model in memory whose weights can be trained while it computes on quantized ones.

Calibrated in the dtype of the source, exactly as without training, and then held in float32: before the first step it
computes what a checkpoint of the same plan without training computes. Ranges that packing takes from the weights follow
the current weights in every forward (``quantize/current_ranges.py``); those that the plan keeps stay as calibrated.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.codecs import get_codec
from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_directory, atomic_write_json, hash_tree, read_json
from toolchain.core.progress import Progress, Silent
from toolchain.families import Family
from toolchain.formats import get_format
from toolchain.modeling.loading import load_source, pick_device
from toolchain.models.reader import resolve_model
from toolchain.plan.rules import require_allowed
from toolchain.plan.types import Plan
from toolchain.qat.identity import require_settings, require_unchanged, settings_of
from toolchain.quantize import current_ranges, quantizer_state, quantizers, scales
from toolchain.quantize.job import alone, calibrate, family_of

ABOUT, WEIGHTS = "start.json", "weights.safetensors"
"""Files of ``save_start``, beside the quantizers."""


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
    chosen: frozenset[str] = frozenset()
    """Module paths of matrices that begin at values which the recipe chose."""


def make_student(
    plan: Plan,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Student:
    """Calibrate ``plan.model`` from scratch.

    Where the recipe chose codes, targets or block scales, and scales are learned, matrices begin at the values that it
    would store. ToolchainError TC-250 when it did and they are not, TC-202 when a matrix lacks an input range.
    """
    progress = progress or Silent()
    done = calibrate(plan, device=device, trust_remote_code=trust_remote_code, progress=progress)
    applied, family = done.exporter.applied, done.exporter.family
    modules = quantizers.planned_modules(done.model, plan, family)
    for path, name in modules.items():  # what packing would miss after hours of training
        linear = done.model.get_submodule(path)
        scales.calibrated(linear, path, needs_input=get_format(name).has_input_scale)
    student = Student(
        model=done.model,
        plan=plan,
        family=family,
        source=done.exporter.source,
        modules=modules,
        folded_norms=frozenset(applied.folded_norms),
        details=applied.details,
        coverage=done.coverage,
        manifest=done.manifest,
        chosen=frozenset(applied.packed),
    )
    _require_trainable(student)
    _ready(student)
    with torch.no_grad():
        for path, tensors in applied.packed.items():
            linear = student.model.get_submodule(path)
            linear.weight.copy_(get_codec(modules[path]).unpack(tensors, torch.float32))
            linear.weight_quantizer.enable()
    return student


def _require_trainable(student: Student) -> None:
    """ToolchainError TC-250 unless the block scales of all matrices that the recipe chose are learned, and go on from
    there. Scales that follow the weights would not be its own, nor the codes under them."""
    from toolchain.qat.learned_scales import learnable

    learned = student.plan.training is not None and student.plan.training.learned_scales
    left = sorted(student.chosen - set(learnable(student) if learned else ()))
    if left:
        raise ToolchainError(
            f"recipe {student.plan.recipe} chose the codes or scales of {len(left)} matrices after calibration, "
            f"{left[0]} for one, and training would not begin there",
            hint="for NVFP4 add --learned-scales and train all quantized roles; else use --recipe max, or transforms "
            "and input scales alone (awq, smoothquant, headroom)",
            code="TC-250",
        )


def _ready(student: Student) -> None:
    """Float32, each parameter with memory of its own, ranges following the weights.

    Unfused experts of a float32 source are views of one tensor, which neither safetensors nor an optimizer that cuts
    parameters over devices can take apart.
    """
    student.model.float()
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.untyped_storage().nbytes() != parameter.nbytes or not parameter.is_contiguous():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    current_ranges.follow(student.model, student.modules)


def save_start(student: Student, directory: Path) -> None:
    """Write what ``load_start`` needs into ``directory``: quantizers, and weights that calibration changed."""
    from safetensors.torch import save_file

    parameters = dict(student.model.named_parameters(remove_duplicate=False))
    # Models are calibrated in their own dtype, most often bfloat16, so that it holds every value.
    weights = {
        name: exact(parameters[name].detach(), torch.bfloat16).cpu()
        for name in sorted(_changed_by_calibration(student))
    }
    with atomic_directory(directory, force=True) as partial:
        save_file(weights, partial / WEIGHTS)
        save_file(quantizer_state.collect(student.model), partial / quantizer_state.FILE)
        about = {
            "schema_version": 1,
            "settings": settings_of(student.plan),
            "folded_norms": sorted(student.folded_norms),
            "details": student.details,
            "coverage": student.coverage,
            "manifest": student.manifest,
            "chosen": sorted(student.chosen),
            "files": hash_tree(partial),
        }
        atomic_write_json(partial / ABOUT, about)


def _changed_by_calibration(student: Student) -> set[str]:
    """Names of parameters that differ from the source before the first step: channel scales, order, zeros."""
    linears: list[Any] = [student.model.get_submodule(path) for path in student.modules]
    scaled = any(linear.input_quantizer.pre_quant_scale is not None for linear in linears)
    reordered = "arranged" in student.details
    if not (scaled or reordered or student.chosen or student.folded_norms or student.plan.sparsity):
        return set()
    return {f"{path}.weight" for path in (*student.modules, *student.folded_norms)}


def exact(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` in ``dtype`` where that holds each of its values, else as it is."""
    small = tensor.to(dtype)
    return small if torch.equal(small.to(tensor.dtype), tensor) else tensor


def load_start(
    plan: Plan,
    directory: Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Student:
    """The student that ``save_start`` wrote, bit for bit, without calibrating.

    ToolchainError TC-252 when ``directory`` was made by another plan, or changed since.
    """
    from safetensors.torch import load_file

    about = read_json(directory / ABOUT)
    require_settings(about["settings"], plan, directory)
    require_unchanged(directory, about["files"])
    source = resolve_model(plan.model)
    (progress or Silent()).note(f"loading {source}")
    student = uncalibrated(plan, source, device=device, trust_remote_code=trust_remote_code)
    quantizer_state.restore(student.model, load_file(directory / quantizer_state.FILE))
    _ready(student)  # before weights are restored: what a recipe chose is no bfloat16
    with torch.no_grad():
        for name, tensor in load_file(directory / WEIGHTS).items():
            student.model.get_parameter(name).copy_(tensor)
    return replace(
        student,
        folded_norms=frozenset(about["folded_norms"]),
        details=about["details"],
        coverage=about["coverage"],
        manifest=about["manifest"],
        chosen=frozenset(about.get("chosen", ())),  # absent: begun before recipes could choose,
    )


def uncalibrated(
    plan: Plan,
    directory: Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Student:
    """The model in ``directory`` with the quantizers of ``plan``, which have no ranges yet. ``dtype`` None: its own."""
    require_allowed(plan)
    with alone(plan), contextlib.redirect_stdout(io.StringIO()):  # ModelOpt prints; stdout is for data
        model = load_source(
            directory, device=pick_device(device), dtype=dtype, trust_remote_code=trust_remote_code
        )
        family = family_of(model, directory)
        modules = quantizers.insert(model, plan, family)
    return Student(model=model, plan=plan, family=family, source=directory, modules=modules)
