"""A trained student -> a plain Hugging Face directory in the layout and dtype of its source.

Written tensor by tensor over the source's files: what was not trained is copied bit for bit. Weights with a channel
scale of their own on the input are written without it, so that the directory is a plain, correct model; the scale is in
``quantizers.safetensors``, and the export applies it again. Norms that took a scale and their consumers are written as
they are: together they compute what they computed before.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from toolchain.checkpoint.reader import CheckpointReader
from toolchain.checkpoint.source import QuantizedSource, open_source
from toolchain.checkpoint.writer import write_shards
from toolchain.codecs.fused import fuse_experts
from toolchain.core.files import atomic_directory, atomic_write_json, hash_tree, read_json
from toolchain.core.progress import Progress, Silent
from toolchain.models.shards import INDEX, SINGLE
from toolchain.qat import layout
from toolchain.qat.identity import settings_of
from toolchain.qat.roles import trained_names
from toolchain.qat.student import Student
from toolchain.quantize import quantizer_state
from toolchain.quantize.export_configs import copy_side_files

RECORD, LEARNED = "training.json", "learned_scales.safetensors"


@torch.no_grad()
def settle(student: Student) -> None:
    """Round the student's weights to what ``write_trained`` stores, in place. Settling again changes nothing.

    From here on the student computes what the exported checkpoint computes.
    """
    stored = layout.stored_dtypes(open_source(student.source), student.family)
    names = written_parameters(student)
    layout.require_stored(student.model, names, stored)
    parameters = dict(student.model.named_parameters(remove_duplicate=False))
    for name in sorted(names & stored.keys()):
        scale = channel_scale(student, name)
        plain = plain_weight(parameters[name], scale, stored[name]).float()
        parameters[name].copy_(plain if scale is None else plain / scale)


def written_parameters(student: Student) -> set[str]:
    """Names of the parameters that are written from memory: trained ones, quantized matrices and norms that took a
    scale. All names of a shared one."""
    calibrated = {f"{path}.weight" for path in (*student.modules, *student.folded_norms)}
    named = dict(student.model.named_parameters(remove_duplicate=False))
    ids = {id(named[name]) for name in calibrated | trained_names(student)}
    return {name for name, item in named.items() if id(item) in ids}


def plain_weight(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] as trained behind the channel ``scale`` [in] of its input -> without it, rounded to ``dtype``."""
    return (weight if scale is None else weight * scale).to(dtype)


def channel_scale(student: Student, name: str) -> torch.Tensor | None:
    """``pre_quant_scale`` [in] on the input of the matrix whose parameter is ``name``; None without one."""
    path, _, suffix = name.rpartition(".")
    if suffix != "weight" or path not in student.modules:
        return None
    linear: Any = student.model.get_submodule(path)
    scale: torch.Tensor | None = linear.input_quantizer.pre_quant_scale
    return scale


def write_trained(
    student: Student,
    directory: Path,
    record: dict[str, Any],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Settle the student and write it to ``directory``, complete or absent; ``record`` becomes part of training.json.

    Beside the model: ``quantizers.safetensors``, learned scales where there are some, and ``training.json`` with the
    hashes of all.
    """
    from safetensors.torch import save_file

    settle(student)
    reader = open_source(student.source)
    with atomic_directory(directory, force=force) as partial:
        write_shards(partial, _tensors(student, reader, progress or Silent()))
        _write_index(partial)
        _write_config(partial, reader)
        copy_side_files(student.source, partial)
        save_file(quantizer_state.collect(student.model), partial / quantizer_state.FILE)
        if student.plan.training and student.plan.training.learned_scales:
            from toolchain.qat.learned_scales import learned_state

            save_file(learned_state(student), partial / LEARNED)
        atomic_write_json(
            partial / RECORD, {**_about(student), "record": record, "files": hash_tree(partial)}
        )


def _about(student: Student) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "settings": settings_of(student.plan),
        "folded_norms": sorted(student.folded_norms),
        "calibration": student.manifest,
        "coverage": student.coverage,
    }


@torch.no_grad()
def _tensors(
    student: Student, reader: CheckpointReader, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    written = written_parameters(student)
    infos = reader.infos.values()
    for info in progress.track(infos, description="write the trained model", total=len(infos)):
        names = [name for name in layout.parameter_names(student.family, info) if name in written]
        if names and info.dtype in layout.DTYPES:
            pieces = [_piece(student, name, layout.DTYPES[info.dtype]) for name in names]
            yield info.name, _joined(student, info.name, pieces)
        else:
            yield info.name, reader.get(info.name)


def _piece(student: Student, name: str, dtype: torch.dtype) -> torch.Tensor:
    return plain_weight(student.model.get_parameter(name), channel_scale(student, name), dtype)


def _joined(student: Student, name: str, pieces: list[torch.Tensor]) -> torch.Tensor:
    """The tensor ``name`` of the source, of the parameters that it holds."""
    family = student.family
    module, suffix = family.split(name)
    if not family.is_fused(module):
        return pieces[0]
    (joined,) = fuse_experts(family, module, "", [{suffix: piece} for piece in pieces]).values()
    return joined


def _write_index(directory: Path) -> None:
    """An index also of a single shard: it says that the other safetensors files beside it hold no weights."""
    if (directory / INDEX).exists():
        return
    infos = CheckpointReader(directory).infos.values()
    total = {"total_size": sum(info.bytes for info in infos)}
    weight_map = {info.name: SINGLE for info in infos}
    atomic_write_json(directory / INDEX, {"metadata": total, "weight_map": weight_map})


def _write_config(directory: Path, reader: CheckpointReader) -> None:
    if isinstance(reader, QuantizedSource):
        config = read_json(reader.directory / "config.json")
        config.pop("quantization_config", None)
        atomic_write_json(directory / "config.json", config)
    else:
        shutil.copyfile(reader.directory / "config.json", directory / "config.json")
