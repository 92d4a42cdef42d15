"""The control of a training: the unquantized model, trained on the same text in the same way.

Training on more text changes a model even where nothing was lost. What distillation gives back can only be told from
that by measuring how far the same steps carry a model that needs no recovery: its distance from the untouched one, and
what it gains in perplexity.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from toolchain.core.progress import Progress, Silent
from toolchain.modeling.loading import load_source, pick_device
from toolchain.models.reader import resolve_model
from toolchain.plan.types import Plan
from toolchain.qat.data import load_sequences
from toolchain.qat.roles import trainable_parameters
from toolchain.qat.run import explained_memory, planned, run_training
from toolchain.qat.session import begun_with, open_session
from toolchain.qat.student import Student
from toolchain.qat.teacher import load_teacher
from toolchain.quantize.job import family_of
from toolchain.quantize.precision import float32_matmuls
from toolchain.quantize.quantizers import planned_modules


def train_control(
    plan: Plan,
    work: Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the unquantized ``plan.model`` with next-token cross entropy on the data, in the order, with the steps and
    the learning rate of ``plan.training``; nothing is stored but the files of the training in ``work``.

    The same weights are trained, themselves and not by adapters. Returns ``before`` and ``after`` (the last step):
    held-out ``ce``, ``ppl``, and ``kl``, ``top1`` and ``router`` against the untouched model; ``steps``, and
    ``held_out`` by step.
    """
    progress, asked = progress or Silent(), planned(plan)
    training = replace(
        asked, method="qat", teacher="", temperature=1.0, router_weight=0.0, patience=0, lora_rank=0, lora_alpha=0.0,
        learned_scales=False, devices=1, accumulate=asked.accumulate * asked.devices,
    )  # fmt: skip
    source, target = resolve_model(plan.model), pick_device(device)
    sequences = load_sequences(asked, source, progress)
    described = {**begun_with(replace(plan, training=training), sequences.identity), "control": True}
    with open_session(work, described, progress=progress) as session, explained_memory(training):
        how: dict[str, Any] = dict(device=target, dtype=torch.float32, trust_remote_code=trust_remote_code)
        model = load_source(source, **how)
        family = family_of(model, source)
        modules = planned_modules(model, plan, family)
        trainable_parameters(
            Student(model=model, plan=plan, family=family, source=source, modules=modules), progress
        )
        untouched = load_teacher(source, **how)
        with float32_matmuls(allow_tf32=plan.calibration.allow_tf32):
            run_training(
                model,
                untouched,
                sequences,
                training,
                session,
                device=target,
                metric="ce",
                progress=progress,
            )
        figures = session.metrics.held_out()
    last = max(figures)
    return {
        "steps": last,
        "before": figures[0],
        "after": figures[last],
        "held_out": {str(step): found for step, found in figures.items()},
        "data": sequences.identity,
    }
