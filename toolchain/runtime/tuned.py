"""Settings of the fused kernels for the GPU at hand: those of the engine, else found now, and kept there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress, Silent
from toolchain.runtime.location import Limits

if TYPE_CHECKING:
    import torch

    from toolchain.kernels.settings import Settings
    from toolchain.modeling.packed.tuning import Tuned


def tuned(
    model: Any,
    engine: Path | None,
    limits: Limits,
    *,
    device: torch.device,
    progress: Progress | None = None,
    **options: Any,
) -> list[str]:
    """Make a packed ``model`` use the table of ``engine`` for this GPU; what it lacks is tuned and stored.

    Returns what a user should know: that the engine was tuned again, and why. ``options``: of ``tune``.
    """
    from toolchain.kernels.table import identity_of, others, read_table, settings_of, write_table

    identity = identity_of(device)
    notes = []
    found: dict[str, dict[int, Settings]] = {}
    if engine is not None:
        try:
            stored = read_table(engine, identity)
        except ToolchainError as error:
            notes.append(f"{error}; tuning again")
        else:
            if stored is None:
                notes.append(_why(identity, others(engine)))
            found = stored or {}
    else:
        notes.append(
            "a checkpoint has no table of kernel settings: tuning now, which `toolchain build` does once"
        )
    made = find(model, limits, device=device, progress=progress or Silent(), known=found, **options)
    if made.table:
        if found:
            notes.append(f"the table of this engine does not know {', '.join(made.table)}: tuned now")
        for key, rows in settings_of(made.table).items():
            found.setdefault(key, {}).update(rows)
        if engine is not None:
            try:
                notes.append(f"stored in {write_table(engine, identity, made.table)}")
            except OSError as error:
                notes.append(f"the table cannot be stored, the next start tunes again: {error}")
    model.toolchain_chooser.use(found)
    return notes


def find(model: Any, limits: Limits, *, device: torch.device, progress: Progress, **options: Any) -> Tuned:
    """Tune for all batches of decoding and for prompts of one prefill."""
    import torch

    from toolchain.modeling.packed.tuning import token_counts, tune
    from toolchain.runtime.model import OTHER_PREFILL_TOKENS

    if device.type == "cuda":
        torch.cuda.set_device(device)
    most = max(limits.max_batch_size, min(OTHER_PREFILL_TOKENS, limits.max_seq_len * limits.max_batch_size))
    return tune(model, **{"tokens": token_counts(most), "device": device, "progress": progress, **options})


def _why(identity: Any, made_on: list[dict[str, Any]]) -> str:
    """What is another than when the engine was tuned."""
    if not made_on:
        return f"the kernels of this engine are tuned for no GPU yet: tuning for {identity.gpu}"
    nearest = min(
        made_on, key=lambda found: sum(found.get(name) != value for name, value in vars(identity).items())
    )
    changed = [
        f"{name} {nearest.get(name)!r}, here {value!r}"
        for name, value in vars(identity).items()
        if nearest.get(name) != value
    ]
    return f"the kernels of this engine were tuned for another {'; '.join(changed)}: tuning again"
