"""The teacher of distillation, and the judge of early stopping: a model that speaks the student's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.core.errors import UsageError
from toolchain.core.progress import Progress, Silent
from toolchain.data.tokenizer import load_tokenizer
from toolchain.modeling.loading import load_source
from toolchain.models.reader import resolve_model
from toolchain.plan.steps import Training

PROBE = "The 12,345th  naïve test:\n\tdéjà vu — 東京 и Москва; x = [0.5, -1e-3]  # don't\r\n🙂 مرحبا\n\n"
"""Text on which tokenizers of one vocabulary differ when they split or normalize differently."""


def needs_teacher(training: Training) -> bool:
    """Distillation learns from it; early stopping measures the distance from it."""
    return training.method == "qad" or training.patience > 0


def teacher_directory(training: Training, source: Path, progress: Progress | None = None) -> Path:
    """Where the teacher lies, checked before anything is loaded. UsageError TC-253 for another vocabulary."""
    if not training.teacher:
        return source
    teacher = resolve_model(training.teacher)
    if teacher.resolve() != source.resolve():
        require_same_tokenizer(teacher, source)
    return teacher


def require_same_tokenizer(teacher: Path, student: Path) -> None:
    """UsageError TC-253, with the first token that differs, unless the tokenizers of both directories give the same
    ids: the same vocabulary, and the same ids for a text of many scripts."""
    theirs, ours = load_tokenizer(teacher), load_tokenizer(student)
    difference = _first_difference(theirs.get_vocab(), ours.get_vocab())
    if not difference:
        difference = _first_split(theirs, ours)
    if difference:
        raise UsageError(
            f"the teacher {teacher} has another tokenizer than {student}: {difference}",
            hint="distil from a model with the same tokenizer, or use --method qat, which needs no teacher",
            code="TC-253",
        )


def _first_difference(theirs: dict[str, int], ours: dict[str, int]) -> str:
    """Names the token of the lowest id that is not the same; empty when both are."""
    if theirs == ours:
        return ""
    mine, other = ({index: token for token, index in vocab.items()} for vocab in (ours, theirs))
    at = min(index for index in mine.keys() | other.keys() if mine.get(index) != other.get(index))
    sizes = f"{len(theirs)} tokens instead of {len(ours)}; " if len(theirs) != len(ours) else ""
    return f"{sizes}token {at} is {other.get(at)!r}, in the student {mine.get(at)!r}"


def _first_split(theirs: Any, ours: Any) -> str:
    other, mine = (item(PROBE, add_special_tokens=False)["input_ids"] for item in (theirs, ours))
    if other == mine:
        return ""
    at = next(
        (i for i, (a, b) in enumerate(zip(other, mine, strict=False)) if a != b), min(len(other), len(mine))
    )
    tokens = [item.convert_ids_to_tokens(ids[at : at + 1]) for item, ids in ((theirs, other), (ours, mine))]
    return f"the same text is split differently, from token {at} on: {tokens[0]}, in the student {tokens[1]}"


def teacher_dtype(training: Training) -> torch.dtype | None:
    """float32 beside a student that computes in float32, else the teacher's own (None).

    A bfloat16 forward pass is 0.0001 nats per token away from a float32 one on the demo, noise that a student would
    chase: NVFP4 takes 0.0042.
    """
    return torch.float32 if training.precision == "fp32" else None


def load_teacher(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """The model of ``directory`` in ``dtype`` (None: its own), in evaluation mode; no parameter asks for a gradient."""
    (progress or Silent()).note(f"loading the teacher {directory} on {device}")
    model = load_source(directory, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.requires_grad_(False).eval()
