"""The rows of ``toolchain support``."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from toolchain.core.gpus import GPUS, Gpu, get_gpu
from toolchain.formats import FORMATS, get_format
from toolchain.formats.base import Format
from toolchain.targets.alternatives import alternatives
from toolchain.targets.backends import BackendState, backend_states
from toolchain.targets.base import Target
from toolchain.targets.known_bad import KnownBad
from toolchain.targets.rows import Model, State
from toolchain.targets.trtllm import REASONS


@dataclass(frozen=True, kw_only=True)
class SupportRow:
    """One line of ``toolchain support``."""

    target: str
    version: str
    gpu: str
    sm: int
    format: str
    model: Model
    state: State
    backend: str
    """``moe_config.backend`` that is chosen for a mixture of experts; empty where there is no choice."""
    note: str
    source: str
    """Where the row comes from; empty where there is none."""
    backends: tuple[BackendState, ...] = ()
    """Every MoE backend of the release, for mixtures of experts."""
    known_bad: tuple[KnownBad, ...] = ()
    """Reports against some models or parallelism in this row."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def support_rows(
    targets: tuple[Target, ...],
    *,
    gpu: str | None = None,
    format: str | None = None,
    version: str | None = None,
) -> list[SupportRow]:
    """Every combination of target, GPU, format and kind of model, supported or not.

    ``version`` is a TensorRT-LLM release; targets that have other numbers keep their own. Unknown names raise
    UsageError.
    """
    gpus = (get_gpu(gpu),) if gpu else GPUS
    formats = (get_format(format),) if format else FORMATS
    models: tuple[Model, ...] = ("moe", "dense")
    return [
        _support(target, version or target.default_version, one_gpu, one_format, model)
        if target.needs_gpu
        else _support(target, target.default_version, one_gpu, one_format, model)
        for target in targets
        for one_gpu in gpus
        if one_gpu.sm or not target.needs_gpu
        for one_format in formats
        for model in models
    ]


def _support(target: Target, version: str, gpu: Gpu, format: Format, model: Model) -> SupportRow:
    row = target.find(format_name=format.name, sm=gpu.sm, model=model, version=version)
    note = row.note if row else "; or ".join(alternatives(target, version, gpu, format, model))
    reason = "" if row or target.name != "trtllm" else REASONS.get((format.name, model), "")
    reports = (
        item
        for item in target.known_bad(version)
        if item.concerns(version=version, sm=gpu.sm, format_name=format.name, model=model)
    )
    return SupportRow(
        target=target.name,
        version=version,
        gpu=gpu.name,
        sm=gpu.sm,
        format=format.name,
        model=model,
        state=row.state if row else "no",
        backend=row.backend if row and model == "moe" else "",
        note=f"{reason}; {note}" if reason else note,
        source=row.source if row else "",
        backends=backend_states(target, version, gpu.sm, format.name) if model == "moe" else (),
        known_bad=tuple(reports) if row else (),
    )
