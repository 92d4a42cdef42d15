"""Quantize without data: shard by shard, tensor by tensor, in memory that does not grow with the model.

No model code runs: what is done follows from the plan and from the names in the files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from toolchain.checkpoint.quant_config import TIED_HEAD
from toolchain.checkpoint.source import QuantizedSource, open_source
from toolchain.checkpoint.writer import write_index
from toolchain.core.environment import package_versions, peak_memory_bytes
from toolchain.core.files import (
    atomic_write_json,
    hash_tree,
    refuse_to_replace_source,
    require_free_bytes,
    sha256_json,
)
from toolchain.core.progress import Progress, Silent
from toolchain.families import Family, get_family
from toolchain.formats import get_format
from toolchain.models.config import config_dtype, read_config, text_config
from toolchain.models.reader import resolve_model
from toolchain.plan.rules import require_allowed
from toolchain.plan.types import Plan
from toolchain.quantize.export_configs import copy_side_files, write_configs
from toolchain.quantize.manifest import make_manifest
from toolchain.quantize.streaming.choice import require_data_free
from toolchain.quantize.streaming.executor import ExecutorOptions, Written, open_executor
from toolchain.quantize.streaming.journal import open_journal, publish
from toolchain.quantize.streaming.outline import Outline, make_outline
from toolchain.quantize.streaming.pack import Packer
from toolchain.quantize.streaming.rows import TORCH_DTYPES, Rows
from toolchain.quantize.streaming.shards import total_bytes
from toolchain.recipes import get_recipe


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened source and what is to become of it."""

    plan: Plan
    directory: Path
    family: Family
    outline: Outline
    rows: Rows


def quantize_stream(
    plan: Plan,
    output: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    executor: ExecutorOptions | None = None,
    force: bool = False,
    on_replace: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize ``plan.model`` into ``output`` without data, and return the manifest (also quantize.json there).

    A run that ends early leaves its finished shards beside ``output``; the same call goes on with them, with whatever
    ``executor``. ``on_replace`` is called when all is written, just before ``output`` appears or its old content is
    replaced. UsageError TC-232 for a plan that needs data.
    """
    progress = progress or Silent()
    require_allowed(plan)
    require_data_free(plan)
    started = time.monotonic()
    source = open_stream(plan, dtype=named_dtype(resolve_model(plan.model)))
    refuse_to_replace_source(output, source.directory)
    with (
        open_executor(executor or ExecutorOptions(), device=device, threads=threads) as packing,
        open_journal(output, settings(source), force=force, progress=progress) as journal,
    ):
        hashes = journal.finished([shard.file for shard in source.outline.shards], progress)
        todo = [shard for shard in source.outline.shards if shard.file not in hashes]
        if hashes:
            progress.note(f"going on: {len(hashes)} of {len(source.outline.shards)} shards are finished")
        require_free_bytes(output, total_bytes(todo), what="the quantized checkpoint")
        written = packing.write_shards(source, todo, journal, progress=progress)
        manifest = _complete(source, packing.device, written, journal.content, hashes, started)
        if on_replace is not None:
            on_replace()
        publish(journal, output)
    return manifest


def open_stream(plan: Plan, *, dtype: torch.dtype | None = None) -> Source:
    """``dtype``: what the model computes in; None: what its files hold."""
    directory = resolve_model(plan.model)
    reader = open_source(directory)
    config = text_config(read_config(directory))
    architecture = (config.get("architectures") or [""])[0]
    family = get_family(str(config.get("model_type", "")), architecture, list(reader.infos))
    names = {kind: name for name, kind in TORCH_DTYPES.items()}
    outline = make_outline(
        plan,
        reader,
        family,
        layers=int(config.get("num_hidden_layers", 0)),
        dtype=names[dtype] if dtype else None,
    )
    return Source(plan=plan, directory=directory, family=family, outline=outline, rows=Rows(reader))


def named_dtype(directory: Path) -> torch.dtype | None:
    """What config.json says that the model computes in; None where it does not."""
    config = text_config(read_config(directory))
    named = config.get("dtype") or config.get("torch_dtype")
    return TORCH_DTYPES[config_dtype(config)] if named else None


def make_packer(source: Source, device: torch.device) -> Packer:
    return Packer(
        source.rows,
        source.outline,
        source.family,
        get_recipe(source.plan.recipe, get_format(source.plan.format)),
        # A model computes in the dtype of its config, whatever its files hold.
        dtype=named_dtype(source.directory),
        device=device,
        sparse=source.plan.sparsity is not None,
    )


def settings(source: Source) -> dict[str, Any]:
    """What decides the bytes: none of it may change between a run and the one that goes on with it."""
    plan, versions = source.plan, package_versions()
    files = sorted({info.file for info in source.rows.reader.stored.values()})
    stats = [(file, (source.directory / file).stat()) for file in files]
    return {
        "model": plan.model,
        "model_identity": plan.model_identity,
        "source files": sha256_json([[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]),
        "format": plan.format,
        "policy": plan.policy,
        "recipe": plan.recipe,
        "kv_cache": plan.kv_cache,
        **({"sparsity": asdict(plan.sparsity)} if plan.sparsity else {}),
        "assignments": sha256_json(
            [(item.role, item.layer, item.projections, item.format) for item in plan.assignments]
        ),
        **{f"version of {name}": versions.get(name) for name in ("toolchain", "torch", "nvidia-modelopt")},
    }


def _complete(
    source: Source, device: str, written: Written, content: Path, before: dict[str, str], started: float
) -> dict[str, Any]:
    """Index, configs, side files, plan and manifest. ``before``: hashes of the shards that were there already."""
    manifest = make_manifest(
        source.plan,
        device=torch.device(device),
        data=None,
        coverage=None,
        details={**_source_numbers(source, written.cast), **written.details},
        seconds={"quantize": round(time.monotonic() - started, 2)},
        streamed="data-free",
    )
    return complete(source, content, before | written.hashes, manifest)


def complete(
    source: Source, content: Path, hashes: dict[str, str], manifest: dict[str, Any]
) -> dict[str, Any]:
    """All that stands beside the shards, whose ``hashes`` are known; returns the manifest as it is written, last."""
    weight_map = {spec.name: shard.file for shard in source.outline.shards for spec in shard.outputs}
    write_index(content, weight_map, source.outline.bytes)
    reader = source.rows.reader
    # Asked only where it matters: transformers takes three seconds to say.
    tied = f"{TIED_HEAD}.weight" not in reader.infos and _is_tied(source.directory)
    write_configs(content, source.plan, reader, source.family, tied=tied)
    copy_side_files(source.directory, content)
    atomic_write_json(content / "plan.json", source.plan.to_json())
    others = hash_tree(content, skip=hashes)
    manifest = {
        **manifest,
        "tensor_bytes": source.outline.bytes,
        "peak_memory_bytes": peak_memory_bytes(),
        "files": dict(sorted({**hashes, **others}.items())),
    }
    atomic_write_json(content / "quantize.json", manifest)
    return manifest


def _source_numbers(source: Source, cast: dict[str, dict[str, int]]) -> dict[str, Any]:
    if not isinstance(source.rows.reader, QuantizedSource):
        return {}
    copied = sum(item.kept_codes for shard in source.outline.shards for item in shard.items)
    return {"source_numbers": {"copied": copied, "cast": cast}} if copied or cast else {}


def _is_tied(directory: Path) -> bool:
    """What transformers makes of config.json: the default differs from model to model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError, OSError):  # the code of this model is not in transformers
        return bool(text_config(read_config(directory)).get("tie_word_embeddings", False))
    return bool(config.get_text_config().tie_word_embeddings)
