"""Quantize with data, layer by layer: never more than one decoder layer is in memory, and the files are the same.

Two streams of hidden states pass through the layers. ``observed`` is what the unquantized model computes, on which
ModelOpt takes ranges; ``shipped`` is what the finished layers compute, which recipes see (``accuracy/layers.py``). Both
are what the model in memory would compute, bit for bit, since each layer runs on the same batches.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from toolchain.core.files import (
    atomic_write_json,
    read_json,
    refuse_to_replace_source,
    require_free_bytes,
    sha256_json,
)
from toolchain.core.progress import Progress, Silent
from toolchain.modeling.layered import LayeredModel
from toolchain.modeling.loading import pick_device
from toolchain.models.reader import resolve_model
from toolchain.plan.rules import require_allowed
from toolchain.plan.types import Plan
from toolchain.quantize import quantizers, starved
from toolchain.quantize.calibration import CalibrationSet, load_calibration
from toolchain.quantize.forward import CalibrationPass
from toolchain.quantize.manifest import make_manifest
from toolchain.quantize.sampling import select
from toolchain.quantize.streaming.datafree import (
    Source,
    complete,
    make_packer,
    named_dtype,
    open_stream,
    settings,
)
from toolchain.quantize.streaming.executor import ExecutorOptions, open_executor
from toolchain.quantize.streaming.journal import Journal, open_journal, publish
from toolchain.quantize.streaming.layer_journal import CHOSEN, LayerJournal
from toolchain.quantize.streaming.layer_pieces import LayerPieces
from toolchain.quantize.streaming.layer_shards import LayerShards
from toolchain.quantize.streaming.layer_step import LayerSteps, merge_details, split_steps
from toolchain.quantize.streaming.routing import RoutedLayers
from toolchain.quantize.streaming.rows import TORCH_DTYPES


def quantize_layers(
    plan: Plan,
    output: Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    executor: ExecutorOptions | None = None,
    on_replace: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize ``plan.model`` into ``output``, and return the manifest (also quantize.json there).

    A run that ends early leaves its finished layers beside ``output``; the same call goes on with them. Arguments and
    errors as ``quantize``; ToolchainError TC-234 names a layer that failed.
    """
    progress = progress or Silent()
    require_allowed(plan)
    # oneDNN keeps a compiled matmul per number of tokens that an expert got, which is another each time: 25 MB a layer.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    started = time.monotonic()
    directory, target = resolve_model(plan.model), pick_device(device)
    dtype = dtype or named_dtype(directory)
    source = open_stream(plan, dtype=dtype)
    dtype = dtype or _stored_dtype(source)
    refuse_to_replace_source(output, directory)
    data = load_calibration(plan.calibration, directory, progress) if quantizers.needs_data(plan) else None
    wanted = {**settings(source), **_own_settings(plan, data, dtype, target)}
    with (
        _frozen_heap(),
        open_executor(executor or ExecutorOptions(), device="cpu") as packing,
        open_journal(output, wanted, force=force, progress=progress) as journal,
        packing.pieces(source, journal) as pieces,
    ):
        layered = LayeredModel(
            directory,
            source.family,
            dict(source.rows.reader.modules(source.family)),
            lambda name: read_whole(source, name),
            device=target,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        if data:
            data = _chosen(layered, data, plan, journal, target, progress)
        with layered.whole() as model:
            forward = CalibrationPass(
                model, data, settings=plan.calibration, device=target, progress=progress
            )
        packer = make_packer(source, target)
        records = LayerJournal(journal, "quantize")
        parts = LayerPieces(pieces, source) if pieces and dtype == packer.dtype else None
        shards = LayerShards(source, packer, journal, records, split_steps(source, layered), parts)
        steps = LayerSteps(source, layered, forward, shards)
        require_free_bytes(
            output, shards.missing_bytes() + steps.hidden_bytes(), what="the quantized checkpoint"
        )
        with shards.opened(), progress.meter(description="quantize", total_bytes=shards.left_bytes()) as done:
            steps.run(done, progress)
            hashes = shards.seal(progress)
        coverage = starved.coverage_report(forward.coverage, forward.extra, plan)
        starved.tell(forward.coverage, plan, progress)
        if coverage:
            atomic_write_json(journal.content / starved.FILE, coverage)
        manifest = make_manifest(
            plan,
            device=target,
            data=data,
            coverage=coverage,
            details={**merge_details(steps.details), **packing.about},
            seconds={"quantize": round(time.monotonic() - started, 2)},
            streamed="layers",
        )
        manifest = complete(source, journal.content, hashes, manifest)
        if on_replace is not None:
            on_replace()
        publish(journal, output)
    return manifest


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """What is there already is not searched for garbage after every layer: of the libraries alone that takes 0.4 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def read_whole(source: Source, name: str) -> torch.Tensor:
    """One tensor of the source, dequantized, without mapping its file."""
    info = source.rows.reader.infos[name]
    return source.rows.read(name, 0, info.shape[0] if info.shape else 1)


def _stored_dtype(source: Source) -> torch.dtype:
    """Where config.json names none: that of the first floating tensor, as transformers has it."""
    kinds = (TORCH_DTYPES[info.dtype] for info in source.rows.reader.infos.values())
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def _own_settings(
    plan: Plan, data: CalibrationSet | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What decides the bytes beside the settings of every streamed run."""
    return {
        "calibration": sha256_json(plan.to_json()["calibration"]),
        "calibration tokens": data.identity["tokens_sha256"] if data else None,
        "dtype": str(dtype),
        "device": device.type,
    }


def _chosen(
    layered: LayeredModel,
    pool: CalibrationSet,
    plan: Plan,
    journal: Journal,
    device: torch.device,
    progress: Progress,
) -> CalibrationSet:
    """The samples to calibrate on. The model routes the pool once, layer by layer, if they depend on that."""
    path = journal.layers / CHOSEN
    if path.is_file():
        return pool.take(read_json(path))
    with layered.whole() as model:
        routed = RoutedLayers(
            model, layered, plan.calibration, LayerJournal(journal, "route"), device, progress
        )
    rows = select(
        pool,
        plan.calibration,
        has_experts=bool(routed.coverage.experts),
        routed=routed,
        progress=progress,
    )
    atomic_write_json(path, rows)
    routed.journal.forget()
    return pool.take(rows)
