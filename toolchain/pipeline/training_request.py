"""What a user asks of training: the options of ``toolchain qat``, or ``training:`` of a spec, with the same names."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from toolchain.core.errors import UsageError
from toolchain.evaluate.gates import option
from toolchain.plan.steps import Training

LORA_RANK = 16
LEARNING_RATE, LORA_LEARNING_RATE = 1e-5, 1e-4
"""Of all weights: small, for a model that was trained before. Adapters begin at zero and take ten times as much."""
LISTS = ("data", "held_out", "train")
RENAMED = {"length": "length_tokens", "train": "roles"}
"""Options whose field of ``Training`` has another name."""
DERIVED = (
    "lora",
    "lora_rank",
    "lora_alpha",
    "learning_rate",
    "precision",
    "from_step",
    "seed",
    "chat_template",
)


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """Fields have the names of the options; None means that it is chosen."""

    data: str | list | tuple = ()
    """Paths of text or JSONL (also token ids), or data set names."""
    held_out: str | list | tuple = ()
    held_out_share: float = Training.held_out_share
    held_out_tokens: int = Training.held_out_tokens
    method: str = Training.method
    teacher: str | None = None
    temperature: float = Training.temperature
    router_weight: float = Training.router_weight
    train: str | list | tuple = ()
    """Roles."""
    lora: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    learned_scales: bool = False
    length: int = Training.length_tokens
    batch_size: int = Training.batch_size
    accumulate: int = Training.accumulate
    steps: int = Training.steps
    epochs: float = Training.epochs
    learning_rate: float | None = None
    warmup: float = Training.warmup
    weight_decay: float = Training.weight_decay
    max_grad_norm: float = Training.max_grad_norm
    precision: str | None = None
    gradient_checkpointing: bool = False
    evaluate_every: int = Training.evaluate_every
    patience: int = Training.patience
    keep_checkpoints: int = Training.keep_checkpoints
    devices: int = Training.devices
    parallel: str = Training.parallel
    chat_template: bool | None = None
    """None: as calibration."""
    seed: int | None = None
    """None: as everything else."""
    from_step: int | None = None
    """Go on from the checkpoint of this step, forgetting later ones; None: from the newest."""

    def __post_init__(self) -> None:
        """UsageError TC-007 for values of another type; ranges are findings of the plan."""
        problems = []
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            kinds = get_args(kind) or (kind,)
            fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
            if not fits or (isinstance(value, bool) and bool not in kinds):
                problems.append(f"{option(name)} is {value!r} (expected {getattr(kind, '__name__', kind)})")
            elif name in LISTS and not all(isinstance(item, str) for item in value):
                problems.append(f"{option(name)} is {value!r} (expected a list of text)")
        if problems:
            raise UsageError("; ".join(problems), hint="`toolchain qat --help` lists them", code="TC-007")

    def resolved(self, *, seed: int, chat_template: bool, on_cpu: bool) -> Training:
        """Every value decided; paths absolute, so that the plan means the same wherever it is read."""
        rank = self.lora_rank if self.lora_rank is not None else LORA_RANK if self.lora else 0
        alpha = self.lora_alpha if self.lora_alpha is not None else 2.0 * rank
        rate = LORA_LEARNING_RATE if rank else LEARNING_RATE
        names = [
            item.name for item in fields(self) if item.name not in (*DERIVED, *LISTS, *RENAMED, "teacher")
        ]
        return Training(
            data=tuple(map(absolute, _listed(self.data))),
            held_out=tuple(map(absolute, _listed(self.held_out))),
            roles=tuple(dict.fromkeys(name.replace("-", "_") for name in _listed(self.train))),
            teacher=absolute(self.teacher) if self.teacher else "",
            length_tokens=self.length,
            lora_rank=rank,
            lora_alpha=float(alpha),
            learning_rate=float(rate if self.learning_rate is None else self.learning_rate),
            precision=self.precision or ("fp32" if on_cpu else "bf16"),
            chat_template=chat_template if self.chat_template is None else self.chat_template,
            seed=seed if self.seed is None else self.seed,
            **{name: getattr(self, name) for name in names},
        )

    @property
    def suffix(self) -> str:
        """For the name of the engine: ``-qad``, ``-qat-lora16``."""
        rank = self.lora_rank if self.lora_rank is not None else LORA_RANK if self.lora else 0
        return f"-{self.method}" + (f"-lora{rank}" if rank else "") + ("-lsq" if self.learned_scales else "")


def read_training(value: dict[str, Any]) -> TrainingRequest:
    """A mapping with the names of the options, ``-`` or ``_``. UsageError TC-007 names unknown keys."""
    known = {item.name for item in fields(TrainingRequest)}
    values = {str(key).replace("-", "_"): item for key, item in value.items()}
    unknown = sorted(set(values) - known)
    if unknown:
        near = [difflib.get_close_matches(key, known, n=1) for key in unknown]
        said = [
            f"{key} (did you mean {found[0]}?)" if found else key
            for key, found in zip(unknown, near, strict=True)
        ]
        raise UsageError(
            f"training: unknown keys {', '.join(said)}",
            hint=f"known keys: {', '.join(sorted(known))}",
            code="TC-007",
        )
    return TrainingRequest(**values)


def absolute(source: str) -> str:
    """A local path made absolute, the name of a data set or model on the hub as it is."""
    local = Path(source).expanduser()
    return str(local.resolve()) if local.exists() else source


def _listed(value: str | list | tuple) -> list[str]:
    """One or several; empty texts mean none."""
    return [item for item in ([value] if isinstance(value, str) else value) if item]
