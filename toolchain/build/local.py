"""What target ``local`` wants beside the checkpoint: the settings of its fused kernels on the GPU it is built for."""

from __future__ import annotations

from pathlib import Path

from toolchain.core.gpus import get_gpu, is_named
from toolchain.core.progress import Progress
from toolchain.plan.types import Plan
from toolchain.runtime.location import Limits


def write_local_files(directory: Path, plan: Plan, *, progress: Progress) -> list[Path]:
    """Tune the fused kernels for the shapes and batches of ``plan``, where its GPU is in this machine; the table.

    Elsewhere nothing is written, and it is said: the engine tunes itself when it is loaded there first.
    """
    import torch

    from toolchain.kernels.table import identity_of, write_table
    from toolchain.modeling.packed import load_packed
    from toolchain.runtime.tuned import find

    why = why_not_tuned(directory / "checkpoint", plan)
    if why is not None:
        if plan.gpu != "cpu":
            progress.note(
                f"the fused kernels are not tuned here: {why}; the engine does it when it is loaded first"
            )
        return []
    device = torch.device("cuda")
    model = load_packed(directory / "checkpoint", device=device)
    limits = Limits(max_batch_size=plan.serving.max_batch_size, max_seq_len=plan.serving.max_seq_len)
    made = find(model, limits, device=device, progress=progress)
    progress.note(
        f"{made.tried} settings tried in {made.seconds:.0f} s, {made.failed} of them cannot run here"
    )
    return [write_table(directory, identity_of(device), made.table)]


def local_files(plan: Plan, checkpoint: Path) -> tuple[str, ...]:
    """Names of the files that ``write_local_files`` would write on this machine."""
    if why_not_tuned(checkpoint, plan) is not None:
        return ()
    import torch

    from toolchain.kernels.table import FOLDER, identity_of

    return (f"{FOLDER}/{identity_of(torch.device('cuda')).file}",)


def why_not_tuned(checkpoint: Path, plan: Plan) -> str | None:
    """Why this machine cannot tune for the GPU of ``plan``; None when it can."""
    if plan.gpu == "cpu":
        return "the engine is for a CPU"
    import torch

    from toolchain.modeling.packed import why_not_packed

    if not torch.cuda.is_available():
        return f"there is no {get_gpu(plan.gpu).title} in this machine"
    name = torch.cuda.get_device_name(0)
    if not is_named(get_gpu(plan.gpu), name):
        return f"this machine has {name}, the engine is for {get_gpu(plan.gpu).title}"
    return why_not_packed(checkpoint, torch.device("cuda"))
