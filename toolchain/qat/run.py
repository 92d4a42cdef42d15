"""The training loop of one process: on one device the only one, on several one of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.codecs import compiled
from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress, Silent
from toolchain.modeling.loading import pick_device, quiet_transformers
from toolchain.models.reader import resolve_model
from toolchain.plan.steps import Training
from toolchain.plan.types import Plan
from toolchain.qat.data import Sequences, load_sequences
from toolchain.qat.metrics import Recorder, tensorboard
from toolchain.qat.roles import trainable_parameters
from toolchain.qat.routers import RouterLogits
from toolchain.qat.session import Session
from toolchain.qat.state import trained_parameters
from toolchain.qat.student import Student, load_start
from toolchain.qat.teacher import load_teacher, needs_teacher, teacher_directory, teacher_dtype
from toolchain.quantize.precision import float32_matmuls


def prepare_student(student: Student, progress: Progress | None = None) -> list[nn.Parameter]:
    """Freeze all but what the plan trains, with its adapters and learned scales; returns the trained weights."""
    training = planned(student.plan)
    compiled.load()  # worth it in any training: thousands of small tensors are rounded in every step
    chosen = trainable_parameters(student, progress)
    if training.lora_rank:
        from toolchain.qat.lora import add_lora

        chosen = add_lora(student)
    if training.learned_scales:
        from toolchain.qat.learned_scales import enable_learned_scales

        chosen = {**chosen, **enable_learned_scales(student)}
    return list(chosen.values())


def train_rank(
    plan: Plan,
    work: Path,
    *,
    device: str = "auto",
    student: Student | None = None,
    sequences: Sequences | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> None:
    """Train from the newest checkpoint of ``work``, or from its start state, to the end; all results are files there.

    What launchers of several devices call in every process. ``student`` and ``sequences``: those of this process, when
    it has them already; else they are read from ``work`` and made from the plan. ToolchainError TC-254 for a loss that
    is not finite, TC-255 when memory runs out.
    """
    progress, session, training = progress or Silent(), Session(directory=work), planned(plan)
    target = pick_device(device)
    source = resolve_model(plan.model)
    sequences = sequences or load_sequences(training, source, progress)
    # FSDP2 moves each process's part to its device: whole models need not fit there.
    held = "cpu" if training.devices > 1 and training.parallel == "fsdp2" else device
    with explained_memory(training):
        student = student or load_start(
            plan, session.start, device=held, trust_remote_code=trust_remote_code, progress=progress
        )
        prepare_student(student, progress)
        teacher = None
        if needs_teacher(training):
            teacher = load_teacher(
                teacher_directory(training, source),
                device=pick_device(held),
                dtype=teacher_dtype(training),
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        routers = None
        if training.router_weight and teacher is not None:
            routers = RouterLogits(student.model, student.family), RouterLogits(teacher, student.family)
        with float32_matmuls(allow_tf32=plan.calibration.allow_tf32):
            run_training(
                student.model,
                teacher,
                sequences,
                training,
                session,
                device=target,
                routers=routers,
                sparse=frozenset(f"{path}.weight" for path in student.modules if plan.sparsity),
                progress=progress,
            )


def run_training(
    model: nn.Module,
    teacher: nn.Module | None,
    sequences: Sequences,
    training: Training,
    session: Session,
    *,
    device: torch.device,
    routers: tuple[RouterLogits, RouterLogits] | None = None,
    sparse: frozenset[str] = frozenset(),
    metric: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Train the parameters of ``model`` that ask for gradients; zeros of those named in ``sparse`` stay zeros.

    ``routers``: of student and teacher, for a ``router_weight``.
    ``metric``: held-out figure that the best weights go by; None: ``kl`` where there is a teacher, else ``ce``.
    """
    from toolchain.qat.devices import TellShare
    from toolchain.qat.trainer import make_trainer, prepared, total_steps, training_arguments

    progress, newest = progress or Silent(), session.newest()
    recorder = Recorder(session.metrics, progress)
    quiet_transformers()
    steps = total_steps(training, len(sequences.train))
    arguments = training_arguments(
        training,
        session.directory,
        steps=steps,
        device=device,
        judged=(metric or ("kl" if teacher is not None else "ce")) == "kl",
        resumed=newest is not None,
    )
    with _quiet_stdout(), prepared(model, teacher, training):
        trainer = make_trainer(
            model,
            teacher,
            training,
            arguments,
            train=sequences.train,
            held_out=sequences.held_out,
            routers=routers,
        )
        if arguments.process_index == 0:
            step = int(newest.name.rpartition("-")[2]) if newest else None
            session.metrics.truncate(step)
            trainer.add_callback(recorder)
            trainer.add_callback(TellShare(progress))
            trainer.add_callback(tensorboard(session.directory, step))
        if sparse:
            trainer.add_callback(_keep_zeros(sparse))
        try:
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        except KeyboardInterrupt:
            last = session.newest()
            progress.note(
                f"interrupted; {last.name if last else 'nothing'} is kept: the same command goes on from it"
            )
            raise
        finally:
            recorder.close()
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            trainer.accelerator.free_memory()


def _keep_zeros(names: frozenset[str]) -> Any:
    """A callback that puts zeros of the parameters ``names`` back after every optimizer step."""
    from transformers import TrainerCallback

    from toolchain.quantize.sparsity import hold_zeros

    class KeepZeros(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trained = trained_parameters(kwargs["model"])
            self.hold = hold_zeros([item for name, item in trained.items() if name in names])

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.hold.apply()

    return KeepZeros()


@contextlib.contextmanager
def explained_memory(training: Training) -> Iterator[None]:
    """Memory that runs out becomes ToolchainError TC-255, which says what needs less of it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(training, error) from error
    except RuntimeError as error:
        text = str(error).lower()
        if any(words in text for words in ("out of memory", "not enough memory", "can't allocate memory")):
            raise _out_of_memory(training, error) from error
        raise


def _out_of_memory(training: Training, error: BaseException) -> ToolchainError:
    advice = []
    if training.batch_size > 1:
        smaller, more = max(1, training.batch_size // 2), training.accumulate * 2
        advice.append(f"--batch-size {smaller} --accumulate {more} (the same optimizer step)")
    if not training.gradient_checkpointing:
        advice.append("--gradient-checkpointing")
    if not training.lora_rank:
        advice.append("--lora (no moments of the whole matrices)")
    advice.append("--devices N --parallel fsdp2")
    return ToolchainError(
        f"memory ran out while training: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        hint=f"use {', or '.join(advice)}; other settings begin anew with --force",
        code="TC-255",
    )


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """ModelOpt prints; stdout is for data."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def planned(plan: Plan) -> Training:
    """What ``plan`` trains."""
    if plan.training is None:
        raise ValueError("this plan trains nothing")
    return plan.training
