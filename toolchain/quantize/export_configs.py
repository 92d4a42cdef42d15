"""What stands beside the shards of a checkpoint: its configs, and the files of the source that travel along."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from toolchain.checkpoint.quant_config import (
    FILE,
    MIXED,
    PUBLISHED_MXFP4,
    TIED_HEAD,
    QuantConfig,
    algo_per_module,
    render_flat,
    render_legacy,
    summarize_excluded,
)
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.files import atomic_write_json, read_json
from toolchain.core.roles import Role
from toolchain.families import Family
from toolchain.families.fused import MXFP4
from toolchain.formats import get_format, get_kv_cache
from toolchain.models.types import TensorInfo
from toolchain.plan.types import SOURCE_DTYPE, Plan

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
"""What travels beside the weights: tokenizer, generation config, templates, licences."""
NOT_COPIED = (
    "config.json",
    FILE,
    "model.safetensors.index.json",
    "plan.json",
    "quantize.json",
    "coverage.json",
    "training.json",
)


def is_matrix(family: Family, module: str, info: TensorInfo) -> bool:
    """True for what a format can be given to: [out, in], or the fused experts of a layer."""
    return len(info.shape) == 2 or (len(info.shape) == 3 and family.is_fused(module))


def matrices(reader: CheckpointReader, family: Family) -> Iterator[str]:
    """Names of modules with a matrix: what a quantization config speaks about."""
    for info in reader.infos.values():
        module, suffix = family.split(info.name)
        if suffix == "weight" and is_matrix(family, module, info):
            yield module


def write_configs(
    directory: Path, plan: Plan, reader: CheckpointReader, family: Family, *, tied: bool
) -> None:
    """config.json and hf_quant_config.json of the checkpoint that ``plan`` makes of ``reader``'s tensors.

    ``tied``: the head shares the embedding's weight; it is no tensor then, but runtimes build a module for it.
    """
    import modelopt

    config_json = read_json(reader.directory / "config.json")
    if family.fuses_experts and plan.format == MXFP4:
        atomic_write_json(directory / "config.json", {**config_json, "quantization_config": PUBLISHED_MXFP4})
        return
    names = list(matrices(reader, family))
    formats = {name: plan.format_of(family, name) for name in names}
    taken = {name: get_format(found) for name, found in formats.items() if found != SOURCE_DTYPE}
    head = [TIED_HEAD] if tied and f"{TIED_HEAD}.weight" not in reader.infos else []
    # Norms have no matrix that a runtime could take for a Linear; everything else is listed.
    kept = [
        name for name in (*names, *head) if name not in taken and family.classify(name).role is not Role.NORM
    ]
    algos = {found.quant_algo for found in taken.values()}
    # A quantized head is read from the list of MIXED_PRECISION only (TensorRT-LLM, ``modeling_utils.py``).
    mixed = len(algos) > 1 or any(family.classify(name).role is Role.LM_HEAD for name in taken)
    legacy = render_legacy(
        QuantConfig(
            quant_algo=MIXED if mixed else algos.pop(),
            quantized_layers=algo_per_module(taken, family) if mixed else {},
            kv_cache_quant_algo=get_kv_cache(plan.kv_cache).quant_algo,
            exclude_modules=summarize_excluded(kept, taken),
            producer_version=modelopt.__version__,
        )
    )
    atomic_write_json(directory / FILE, legacy)
    atomic_write_json(directory / "config.json", {**config_json, "quantization_config": render_flat(legacy)})


def copy_side_files(source: Path, directory: Path) -> None:
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in NOT_COPIED:
                shutil.copyfile(path, directory / path.name)
