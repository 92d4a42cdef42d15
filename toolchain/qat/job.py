"""The train stage: a Plan with ``training`` -> a trained model directory, complete or absent."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from toolchain.core.environment import package_versions, peak_memory_bytes
from toolchain.core.files import refuse_occupied, refuse_to_replace_source
from toolchain.core.progress import Progress, Silent
from toolchain.modeling.loading import pick_device
from toolchain.models.reader import resolve_model
from toolchain.plan.types import Plan, Training
from toolchain.qat.data import Sequences, load_sequences
from toolchain.qat.heldout import Judged, measure_held_out
from toolchain.qat.run import explained_memory, prepare_student, train_rank
from toolchain.qat.session import Session, open_session, settings_of
from toolchain.qat.state import TRAINED, restore_parameters
from toolchain.qat.student import Student, load_start, make_student, save_start
from toolchain.qat.teacher import load_teacher, needs_teacher, teacher_directory
from toolchain.qat.trained import settle, write_trained


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

    ``work``: where the training lives until it is done; one that was killed goes on from its newest checkpoint, or
    from that of ``from_step``. ``start_from``: a start state to take the calibration from. ``force``: replace
    ``output``, and begin anew where ``work`` was begun with other settings. Raises UsageError TC-253 for a teacher with
    another tokenizer, and what ``load_sequences`` raises, before a weight is loaded; ToolchainError TC-254 (loss not
    finite), TC-255 (memory), TC-256 (``work`` is of other settings).
    """
    progress, started = progress or Silent(), time.monotonic()
    training = plan.training
    if training is None:
        raise ValueError("this plan trains nothing")
    source = resolve_model(plan.model)
    refuse_to_replace_source(output, source)
    refuse_occupied(output, force=force)
    teacher_directory(training, source, progress)
    sequences = load_sequences(training, source, progress)
    with open_session(
        work, settings_of(plan, sequences.identity), restart=force, progress=progress
    ) as session:
        if from_step is not None:
            session.drop_after(from_step)
        student = _trained(
            plan,
            session,
            sequences,
            device=device,
            start_from=start_from,
            code=trust_remote_code,
            progress=progress,
        )
        return _finish(
            plan,
            session,
            student,
            sequences,
            output,
            device=device,
            force=force,
            started=started,
            progress=progress,
        )


def _trained(
    plan: Plan,
    session: Session,
    sequences: Sequences,
    *,
    device: str,
    start_from: Path | None,
    code: bool,
    progress: Progress,
) -> Student:
    """The student with the weights of its best evaluation, adapters and learned scales still apart."""
    training = _of(plan)
    options: dict[str, Any] = dict(device=device, trust_remote_code=code, progress=progress)
    with explained_memory(training):
        student: Student | None = None
        if not session.start.is_dir():
            student = load_start(plan, start_from, **options) if start_from else make_student(plan, **options)
            save_start(student, session.start)
        if not is_finished(session, training, sequences):
            if training.devices > 1:
                from toolchain.qat.launch import launch

                student = None
                gc.collect()
                launch(plan, session.directory, **options)
            else:
                student = student or load_start(plan, session.start, **options)
                train_rank(plan, session.directory, student=student, sequences=sequences, **options)
                return _with_best(student, session)
        student = student or load_start(plan, session.start, **options)
        prepare_student(student)
        return _with_best(student, session)


def is_finished(session: Session, training: Training, sequences: Sequences) -> bool:
    """Whether the newest checkpoint is the last one."""
    from toolchain.qat.trainer import out_of_patience, total_steps

    if session.newest() is None:
        return False
    state = session.state()
    step, best = int(state["global_step"]), int(state["best_global_step"] or 0)
    return step >= total_steps(training, len(sequences.train)) or out_of_patience(training, step, best)


def _with_best(student: Student, session: Session) -> Student:
    best = int(session.state()["best_global_step"] or 0)
    restore_parameters(student.model, session.checkpoints()[best] / TRAINED)
    return student


def _finish(
    plan: Plan,
    session: Session,
    student: Student,
    sequences: Sequences,
    output: Path,
    *,
    device: str,
    force: bool,
    started: float,
    progress: Progress,
) -> dict[str, Any]:
    """Judge the weights as they are stored, then write them."""
    training = _of(plan)
    if training.lora_rank:
        from toolchain.qat.lora import merge_lora, save_adapters

        save_adapters(student, session.directory / "adapters")
        merge_lora(student)
    settle(student)
    after = _judged(student, sequences, training, pick_device(device))
    record = make_record(session, training, sequences, after)
    record["seconds"] = {**record["seconds"], "this_run": round(time.monotonic() - started, 2)}
    _tell(record, progress)
    write_trained(student, output, record, force=force)
    return record


def _judged(
    student: Student, sequences: Sequences, training: Training, device: torch.device
) -> dict[str, float]:
    """Held-out figures of the settled student, in the precision that it was trained in."""
    teacher = None
    if needs_teacher(training):
        loaded = load_teacher(teacher_directory(training, student.source), device=device)
        teacher = Judged(run=loaded, inner=loaded)
    model: Any = student.model.eval().to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
        return measure_held_out(Judged(run=model, inner=model), teacher, sequences.held_out, device=device)


def make_record(
    session: Session, training: Training, sequences: Sequences, after: dict[str, float]
) -> dict[str, Any]:
    """``training.json``: what was done, on what, and what it gave."""
    from toolchain.qat.trainer import out_of_patience, total_steps

    state, lines, evaluations = session.state(), session.metrics.lines(), session.metrics.held_out()
    steps = [line for line in lines if line["kind"] == "step"]
    step, best = int(state["global_step"]), int(state["best_global_step"] or 0)
    metric = "kl" if needs_teacher(training) else "ce"
    tail = steps[-max(1, len(steps) // 10) :]
    peak = {"host": peak_memory_bytes()}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
    return {
        "schema_version": 1,
        "method": training.method,
        "teacher": training.teacher or "source",
        "steps": step,
        "planned_steps": total_steps(training, len(sequences.train)),
        "epochs": round(float(state["epoch"] or 0), 4),
        "tokens": int(state["num_input_tokens_seen"]),
        "stopped": "patience" if out_of_patience(training, step, best) else "steps",
        "best_step": best,
        "metric": metric,
        "improved": bool(after[metric] < evaluations[0][metric]),
        "held_out": {"before": evaluations[0], "best": evaluations[best], "after": after},
        "loss": {
            "first": steps[0]["loss"] if steps else None,
            "last_tenth": sum(line["loss"] for line in tail) / len(tail) if tail else None,
        },
        "data": sequences.identity,
        "settings": asdict(training),
        "seconds": {"steps": round(sum(line["seconds"] for line in steps), 2)},
        "peak_memory_bytes": peak,
        "versions": package_versions(),
    }


def _tell(record: dict[str, Any], progress: Progress) -> None:
    metric, before, after = record["metric"], record["held_out"]["before"], record["held_out"]["after"]
    change = f"held-out {metric.upper()} {before[metric]:.4g} before training, {after[metric]:.4g} after"
    if record["improved"]:
        progress.note(f"{change} (best step {record['best_step']} of {record['steps']})")
    elif record["best_step"] == 0:
        progress.note(
            f"WARNING: no evaluation was better than the start ({change}): the weights are those of the start. "
            f"Try another --learning-rate, more steps, or other data"
        )
    else:
        progress.note(
            f"WARNING: rounded to the dtype of the source, the trained weights are no better: {change}"
        )


def _of(plan: Plan) -> Training:
    if plan.training is None:
        raise ValueError("this plan trains nothing")
    return plan.training
