"""Whether a student starts from an engine's calibration: its scales are those of the engine's checkpoint, bit for bit.

Compared with bytes that were written and not with records about them: what the calibration of the engine did is in its
checkpoint, whatever machine and release made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress, Silent
from toolchain.qat.student import Student
from toolchain.quantize.accuracy import Applied
from toolchain.quantize.export import Exporter

CALIBRATED = ("input_scale", "weight_scale_2", "pre_quant_scale", "k_scale", "v_scale")
"""Suffixes of what is kept as calibrated; a ``weight_scale`` of one number is, too. Other scales follow the weights."""


@torch.no_grad()
def require_same_scales(student: Student, checkpoint: Path, progress: Progress | None = None) -> int:
    """How many tensors were compared. ToolchainError TC-195 names the first that differ, or are not in ``checkpoint``.

    Call it before the first step: norms that took a channel scale are compared, too.
    """
    progress = progress or Silent()
    stored = CheckpointReader(checkpoint)
    exporter = Exporter(
        student.model,
        student.plan,
        student.family,
        student.source,
        Applied(folded_norms=set(student.folded_norms)),
    )
    infos = exporter.reader.infos
    compared, odd = 0, []
    for name in progress.track(infos, description="compare with the engine", total=len(infos)):
        for written, tensor in _calibrated(exporter, name):
            compared += 1
            problem = _difference(stored, written, tensor)
            if problem:
                odd.append(f"{written} {problem}")
    if odd:
        raise ToolchainError(
            f"{len(odd)} of {compared} calibrated tensors are not those of {checkpoint}: {'; '.join(odd[:3])}",
            hint="it was calibrated by another device or release, or changed since: train from the MODEL instead, or "
            "make the engine again here",
            code="TC-195",
        )
    progress.note(f"training starts from the calibration of {checkpoint}: {compared} scales are bit-equal")
    return compared


def _calibrated(exporter: Exporter, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """What becomes of the tensor ``name`` of the source and training does not change, with KV scales."""
    made = exporter.made(name) or []
    norm = len(made) == 1 and made[0][0] == name
    for written, tensor in made:
        whole = written.endswith("weight_scale") and tensor.numel() == 1
        if norm or whole or written.endswith(CALIBRATED):
            yield written, tensor
    yield from exporter.kv_scale(name)


def _difference(reader: CheckpointReader, name: str, tensor: torch.Tensor) -> str:
    """Empty when the checkpoint has ``tensor``, rounded to the dtype that it is stored in."""
    if name not in reader.infos:
        return "is not there"
    found = reader.get(name).reshape(-1)
    return "" if torch.equal(found, tensor.detach().cpu().reshape(-1).to(found.dtype)) else "differs"
