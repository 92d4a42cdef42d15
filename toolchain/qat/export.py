"""A trained directory -> the quantized checkpoint, under the quantizers that it was trained with.

Packed bytes are a function of two things that lie on disk, the weights in the source's dtype and the quantizers' state,
and of nothing that only a training process knew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from toolchain.checkpoint.source import open_source
from toolchain.core.environment import package_versions, peak_memory_bytes
from toolchain.core.errors import ToolchainError
from toolchain.core.files import (
    atomic_directory,
    atomic_write_json,
    hash_tree,
    read_json,
    refuse_to_replace_source,
    require_free_bytes,
)
from toolchain.core.progress import Progress, Silent
from toolchain.modeling.loading import pick_device
from toolchain.plan.types import Plan
from toolchain.qat import layout
from toolchain.qat.identity import require_settings, require_unchanged
from toolchain.qat.student import Student, exact, uncalibrated
from toolchain.qat.trained import LEARNED, RECORD
from toolchain.quantize import current_ranges, quantizer_state, starved
from toolchain.quantize.accuracy import Applied
from toolchain.quantize.export import Exporter, require_kv_scales
from toolchain.quantize.job import MANIFEST


def export_trained(
    plan: Plan,
    trained: Path,
    output: Path,
    *,
    device: str = "auto",
    force: bool = False,
    on_replace: Callable[[], None] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack ``trained`` into ``output`` and return the manifest, in the form of ``quantize.job.quantize``.

    ToolchainError TC-252 when ``trained`` was made by another plan, or its quantizers were changed.
    """
    progress = progress or Silent()
    about = read_about(plan, trained)
    refuse_to_replace_source(output, trained)
    require_free_bytes(output, plan.estimates.checkpoint_bytes, what="the quantized checkpoint")
    started = time.monotonic()
    progress.note(f"loading {trained}")
    student = uncalibrated(
        plan, trained, device=device, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    exporter = _exporter(student, trained)
    loaded = time.monotonic()
    with atomic_directory(output, force=force, on_replace=on_replace) as directory:
        total = exporter.write(directory, progress)
        atomic_write_json(directory / "plan.json", plan.to_json())
        if about["coverage"]:
            atomic_write_json(directory / starved.FILE, about["coverage"])
        seconds = {"load": round(loaded - started, 2), "export": round(time.monotonic() - loaded, 2)}
        manifest = {
            **about["calibration"],
            "device": str(pick_device(device)),
            "training": about["record"],
            "seconds": {**about["calibration"].get("seconds", {}), **seconds},
            "versions": package_versions(),
            "tensor_bytes": total,
            "peak_memory_bytes": peak_memory_bytes(),
            "files": hash_tree(directory),
        }
        atomic_write_json(directory / MANIFEST, manifest)
    return manifest


def read_about(plan: Plan, trained: Path) -> dict[str, Any]:
    """``training.json`` of a directory that ``plan`` was trained into. ToolchainError TC-252 for another one."""
    path = trained / RECORD
    if not path.is_file():
        raise ToolchainError(
            f"{trained} has no {RECORD}, expected a directory that training wrote",
            hint="run the stage `train` first",
            code="TC-252",
        )
    about: dict[str, Any] = read_json(path)
    require_settings(about["settings"], plan, trained)
    state = (quantizer_state.FILE, LEARNED)
    require_unchanged(trained, {name: about["files"][name] for name in state if name in about["files"]})
    return about


@torch.no_grad()
def _exporter(student: Student, trained: Path) -> Exporter:
    """The student as it was when ``trained`` was written, ready to pack."""
    from safetensors.torch import load_file

    quantizer_state.restore(student.model, load_file(trained / quantizer_state.FILE))
    stored = layout.stored_dtypes(open_source(trained), student.family)
    for path in student.modules:
        linear: Any = student.model.get_submodule(path)
        quantizer = linear.input_quantizer
        if quantizer.pre_quant_scale is not None:
            linear.weight.data = linear.weight / quantizer.pre_quant_scale
            # As it was calibrated, which is how it is stored without training.
            quantizer._pre_quant_scale = exact(quantizer.pre_quant_scale, stored[f"{path}.weight"])
    current_ranges.follow(student.model, student.modules)
    packed: dict[str, dict[str, torch.Tensor]] = {}
    if (trained / LEARNED).is_file():
        from toolchain.qat.learned_scales import packed_with_learned, restore_learned

        restore_learned(student, load_file(trained / LEARNED))
        packed = packed_with_learned(student)
    exporter = Exporter(student.model, student.plan, student.family, trained, Applied(packed=packed))
    config: Any = student.model.config
    require_kv_scales(exporter, student.plan, config.get_text_config().num_hidden_layers)
    return exporter
