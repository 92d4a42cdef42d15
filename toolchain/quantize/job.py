"""The quantize stage: a Plan and its model -> a quantized checkpoint directory, complete or absent.

One job at a time per process: ModelOpt registers classes globally while it works.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.checkpoint.source import open_source
from toolchain.core.environment import peak_memory_bytes
from toolchain.core.errors import ToolchainError
from toolchain.core.files import (
    atomic_directory,
    atomic_write_json,
    hash_tree,
    refuse_to_replace_source,
    require_free_bytes,
)
from toolchain.core.progress import Progress, Silent
from toolchain.families import Family, get_family
from toolchain.modeling.loading import load_source, pick_device
from toolchain.models.reader import resolve_model
from toolchain.plan.rules import require_allowed
from toolchain.plan.types import Plan
from toolchain.quantize import quantizers, scales, starved
from toolchain.quantize.accuracy import Applied, apply_recipe
from toolchain.quantize.calibration import CalibrationSet, load_calibration
from toolchain.quantize.coverage import Coverage
from toolchain.quantize.export import Exporter, require_kv_scales
from toolchain.quantize.forward import CalibrationPass
from toolchain.quantize.manifest import make_manifest
from toolchain.quantize.precast import Precast
from toolchain.quantize.precision import float32_matmuls
from toolchain.quantize.sampling import route_pool, select
from toolchain.quantize.sparsity import sparsify
from toolchain.quantize.streaming.calibrated import quantize_layers
from toolchain.quantize.streaming.choice import choose_way
from toolchain.quantize.streaming.datafree import quantize_stream
from toolchain.quantize.streaming.executor import ExecutorOptions
from toolchain.quantize.streaming.journal import forget_unfinished

_BUSY = threading.Lock()
MANIFEST = "quantize.json"


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A calibrated model in memory: ModelOpt's fake-quantized modules, scales merged, ready to export."""

    model: nn.Module
    exporter: Exporter
    manifest: dict[str, Any]
    coverage: dict[str, Any] | None = None
    """``coverage.json``; None when no expert was counted."""


def quantize(
    plan: Plan,
    output: Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    stream: bool | None = None,
    executor: ExecutorOptions | None = None,
    on_replace: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize ``plan.model`` into ``output`` and return the manifest (also written there as quantize.json).

    ``stream``: shard by shard, or layer by layer where the plan needs data, instead of the whole model in memory; None:
    where memory is short, or ``executor`` has other machines pack. All ways write the same bytes. ``on_replace`` is
    called when all is written, just before ``output`` appears or its old content is replaced.
    """
    progress = progress or Silent()
    require_allowed(plan)
    executor = executor or ExecutorOptions()
    way = choose_way(plan, executor.wish(stream), progress)
    if way == "data-free":
        return quantize_stream(
            plan,
            output,
            device=device,
            executor=executor,
            force=force,
            on_replace=on_replace,
            progress=progress,
        )
    if way == "layers":
        with alone(plan):
            return quantize_layers(
                plan,
                output,
                device=device,
                dtype=dtype,
                executor=executor,
                force=force,
                trust_remote_code=trust_remote_code,
                on_replace=on_replace,
                progress=progress,
            )
    refuse_to_replace_source(output, resolve_model(plan.model))
    require_free_bytes(output, plan.estimates.checkpoint_bytes, what="the quantized checkpoint")
    with atomic_directory(output, force=force, on_replace=on_replace) as directory:
        done = calibrate(
            plan, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress
        )
        started = time.monotonic()
        total = done.exporter.write(directory, progress)
        atomic_write_json(directory / "plan.json", plan.to_json())
        if done.coverage:
            atomic_write_json(directory / starved.FILE, done.coverage)
        done.manifest["seconds"]["export"] = round(time.monotonic() - started, 2)
        manifest = {
            **done.manifest,
            "tensor_bytes": total,
            "peak_memory_bytes": peak_memory_bytes(),
            "files": hash_tree(directory),
        }
        atomic_write_json(directory / MANIFEST, manifest)
    forget_unfinished(output)
    return manifest


def calibrate(
    plan: Plan,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Load, calibrate and merge scales; nothing is written. The model returned computes what the export will."""
    progress = progress or Silent()
    require_allowed(plan)
    with alone(plan):
        return _calibrate(plan, device, dtype, trust_remote_code, progress)


@contextlib.contextmanager
def alone(plan: Plan) -> Iterator[None]:
    """One job of ModelOpt at a time, in the precision that ``plan`` asks for."""
    if not _BUSY.acquire(blocking=False):
        raise ToolchainError("another quantization job runs in this process", hint="use one process per job")
    try:
        with float32_matmuls(allow_tf32=plan.calibration.allow_tf32):
            yield
    finally:
        _BUSY.release()


def _calibrate(
    plan: Plan, device: str, dtype: torch.dtype | None, trust_remote_code: bool, progress: Progress
) -> Quantized:
    source = resolve_model(plan.model)
    open_source(source)  # validates every shard before anything expensive, and refuses a bare config.json
    data = _calibration_data(plan, source, progress)
    started = time.monotonic()
    target = pick_device(device)
    progress.note(f"loading {source} on {target}")
    model = load_source(source, device=target, dtype=dtype, trust_remote_code=trust_remote_code)
    family = family_of(model, source)
    loaded = time.monotonic()
    if data:
        rows = select(
            data,
            plan.calibration,
            has_experts=bool(Coverage(model).experts),
            routed=route_pool(model, plan.calibration, target, progress),
            progress=progress,
        )
        data = data.take(rows)
    forward = CalibrationPass(model, data, settings=plan.calibration, device=target, progress=progress)
    zeros = sparsify(model, plan, family, forward, progress)
    applied = _run_modelopt(model, plan, family, forward, progress)
    if zeros:
        applied.details["sparsity"] = zeros
    exporter = Exporter(model, plan, family, source, applied)
    require_kv_scales(exporter, plan, model.config.get_text_config().num_hidden_layers)
    starved.tell(forward.coverage, plan, progress)
    coverage = starved.coverage_report(forward.coverage, forward.extra, plan)
    manifest = make_manifest(
        plan,
        device=target,
        data=data,
        coverage=coverage,
        details=applied.details,
        seconds={"load": round(loaded - started, 2), "calibrate": round(time.monotonic() - loaded, 2)},
    )
    return Quantized(model=model, exporter=exporter, manifest=manifest, coverage=coverage)


def _calibration_data(plan: Plan, source: Path, progress: Progress) -> CalibrationSet | None:
    if quantizers.needs_data(plan):
        return load_calibration(plan.calibration, source, progress)
    return None


def family_of(model: Any, source: Path) -> Family:
    """The family of ``model``, as loaded from the directory ``source``."""
    architecture = (model.config.architectures or [""])[0]
    return get_family(model.config.model_type, architecture, list(open_source(source).infos))


def _run_modelopt(
    model: nn.Module, plan: Plan, family: Family, forward: CalibrationPass, progress: Progress
) -> Applied:
    """Calibrate ranges, check what was quantized, make fused scales equal, then choose by the recipe."""
    with contextlib.redirect_stdout(io.StringIO()):  # ModelOpt prints; stdout is for data
        modules = quantizers.quantize(model, plan, family, forward)
        scales.share_expert_inputs(model)
        scales.merge_fused(model, quantizers.fused_groups(modules, family))
        if plan.training:  # numbers that are trained do not stay those of the source
            return apply_recipe(model, modules, plan, family, forward, progress)
        source = Precast(open_source(resolve_model(plan.model)), modules, family)
        applied = apply_recipe(model, source.rest(), plan, family, forward, progress)
        source.apply(model, applied, progress)
        return applied
