"""The train stage: a Plan with ``training`` -> a trained model directory, complete or absent."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolchain.core.files import refuse_occupied, refuse_to_replace_source
from toolchain.core.progress import Progress, Silent
from toolchain.modeling.loading import pick_device
from toolchain.models.reader import resolve_model
from toolchain.plan.steps import Training
from toolchain.plan.types import Plan
from toolchain.qat.data import Sequences, load_sequences
from toolchain.qat.heldout import Judged, measure_held_out
from toolchain.qat.record import deciding_metric, make_record, tell
from toolchain.qat.run import explained_memory, planned, prepare_student, train_rank
from toolchain.qat.session import Session, begun_with, open_session
from toolchain.qat.state import TRAINED, restore_parameters
from toolchain.qat.student import Student, load_start, make_student, save_start
from toolchain.qat.teacher import load_teacher, needs_teacher, teacher_directory, teacher_dtype
from toolchain.qat.trained import settle, write_trained

ADAPTERS = "adapters"


def train(
    plan: Plan,
    work: Path,
    output: Path,
    *,
    device: str = "auto",
    start_from: Path | None = None,
    from_step: int | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train ``plan.model`` as planned and write the best weights to ``output``; returns the record, also written there.

    ``work``: where the training lives; one that was killed goes on from its newest checkpoint, or from that of
    ``from_step``. ``start_from``: a start state (``save_start``) to take the calibration from. ``force``: replace
    ``output``, and forget what is in ``work``. Raises UsageError TC-253 for a teacher with another tokenizer,
    and what ``load_sequences`` raises, before a weight is loaded; ToolchainError TC-254 (loss not finite), TC-255
    (memory), TC-256 (``work`` is of other settings).
    """
    progress, training, started = progress or Silent(), planned(plan), time.monotonic()
    source = resolve_model(plan.model)
    refuse_to_replace_source(output, source)
    refuse_occupied(output, force=force)
    teacher_directory(training, source)
    sequences = load_sequences(training, source, progress)
    settings = begun_with(plan, sequences.identity)
    with open_session(work, settings, restart=force, from_step=from_step, progress=progress) as session:
        options = {"device": device, "trust_remote_code": trust_remote_code, "progress": progress}
        job = _Job(plan=plan, session=session, sequences=sequences, options=options)
        with explained_memory(training):
            student, record = job.finish(job.student(start_from))
        seconds = round(time.monotonic() - started, 2)
        record["seconds"]["this_run"] = seconds
        tell(record, progress)
        write_trained(student, output, record, force=force, progress=progress)
        return record


@dataclass(frozen=True, kw_only=True)
class _Job:
    plan: Plan
    session: Session
    sequences: Sequences
    options: dict[str, Any]
    """``device``, ``trust_remote_code`` and ``progress``, as loaders take them."""

    @property
    def training(self) -> Training:
        return planned(self.plan)

    def student(self, start_from: Path | None) -> Student:
        """The student with the weights of its best evaluation; adapters are still apart."""
        student: Student | None = None
        if not self.session.start.is_dir():
            make = load_start(self.plan, start_from, **self.options) if start_from else None
            student = make or make_student(self.plan, **self.options)
            save_start(student, self.session.start)
        trained_here = False
        if self.stopped() is None and self.training.devices > 1:
            from toolchain.qat.launch import launch

            del student
            gc.collect()
            launch(self.plan, self.session.directory, **self.options)
            student = None
        elif self.stopped() is None:
            student = student or load_start(self.plan, self.session.start, **self.options)
            train_rank(
                self.plan, self.session.directory, student=student, sequences=self.sequences, **self.options
            )
            trained_here = True
        if student is None or not trained_here:
            student = student or load_start(self.plan, self.session.start, **self.options)
            prepare_student(student)
        best = int(self.session.state()["best_global_step"] or 0)
        restore_parameters(student.model, self.session.checkpoints()[best] / TRAINED)
        return student

    def stopped(self) -> str | None:
        """Why the training ended, ``patience`` or ``steps``; None while it has not."""
        from toolchain.qat.trainer import out_of_patience, total_steps

        if self.session.newest() is None:
            return None
        state = self.session.state()
        step, best = int(state["global_step"]), int(state["best_global_step"] or 0)
        if out_of_patience(self.training, step, best):
            return "patience"
        return "steps" if step >= total_steps(self.training, len(self.sequences.train)) else None

    def finish(self, student: Student) -> tuple[Student, dict[str, Any]]:
        """Round to what is stored, judge that, and fall back to the start when it is no better."""
        from toolchain.qat.trainer import total_steps

        if self.training.lora_rank:
            from toolchain.qat.lora import merge_lora, save_adapters

            save_adapters(student, self.session.directory / ADAPTERS)
            merge_lora(student)
        settle(student)
        steps = total_steps(self.training, len(self.sequences.train))
        record = make_record(
            self.session,
            self.training,
            self.sequences.identity,
            planned_steps=steps,
            stopped=self.stopped() or "steps",
        )
        record["train_sketch"] = self.sequences.train_sketch
        figures, metric = record["held_out"], deciding_metric(self.training)
        figures["trained"] = self.judge(student)
        record["improved"] = figures["trained"][metric] < figures["before"][metric]
        if not record["improved"]:
            del student
            gc.collect()
            student = load_start(self.plan, self.session.start, **self.options)
            if self.training.learned_scales:  # what was judged before the first step
                from toolchain.qat.learned_scales import enable_learned_scales

                enable_learned_scales(student)
            settle(student)
        figures["after"] = figures["trained"] if record["improved"] else figures["before"]
        return student, record

    def judge(self, student: Student) -> dict[str, float]:
        """Held-out figures of a settled student, in the precision that it was trained in."""
        device, teacher = pick_device(self.options["device"]), None
        if needs_teacher(self.training):
            where = teacher_directory(self.training, student.source)
            code = self.options["trust_remote_code"]
            dtype = teacher_dtype(self.training)
            loaded = load_teacher(where, device=device, dtype=dtype, trust_remote_code=code)
            teacher = Judged(run=loaded, inner=loaded)
        model: Any = student.model.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.training.precision == "bf16"):
            mine = Judged(run=model, inner=model)
            return measure_held_out(mine, teacher, self.sequences.held_out, device=device)
