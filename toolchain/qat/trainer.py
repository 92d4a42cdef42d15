"""ModelOpt's trainers (transformers' Trainer under Accelerate), configured by a Plan's ``training``.

What is ours: checkpoints without pickle (``checkpointing.py``), evaluation by the definitions of ``evaluate``
(``heldout.py``), early stopping on it, the loss in slices (``losses.py``), and that a loss which is not finite ends the
training instead of being filtered.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.opt.plugins import transformers as modelopt_plugin
from modelopt.torch.quantization.plugins import transformers_trainer as modelopt_trainer
from modelopt.torch.quantization.plugins.transformers_trainer import QADTrainer, QATTrainer
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from toolchain.core.errors import ToolchainError
from toolchain.core.roles import Role
from toolchain.plan.steps import Training
from toolchain.qat.checkpointing import SafeCheckpoints
from toolchain.qat.devices import FSDP2, AcrossDevices
from toolchain.qat.files import CHECKPOINTS
from toolchain.qat.heldout import Judged, measure_held_out
from toolchain.qat.losses import distillation_loss
from toolchain.qat.routers import RouterLogits, router_divergence

GC_STEPS = 20
ADAM_BETA2 = 0.95
"""Trainings here are short: with 0.999 the second moments are still those of the warm-up when half of the steps are
done. On the demo (NVFP4, 300 steps) 0.95 closes 39.8 % of the gap, 0.999 38.9 %."""


class _HeldOut(AcrossDevices, SafeCheckpoints):
    """What both methods share. ``judge`` is the teacher, or None: then held-out cross entropy decides."""

    callback_handler: Any
    control: Any

    def configure(self, training: Training, judge: nn.Module | None, held_out: torch.Tensor) -> None:
        self.training, self.held_out_sequences = training, held_out
        self.keep_checkpoints = training.keep_checkpoints
        self._judge = judge
        # Both losses are means over sequences of equal length: the Trainer divides by the number of accumulated
        # passes only when the model does not ask for the number of tokens itself, and ModelOpt's ignores that number.
        self.model_accepts_loss_kwargs = False

    def judge(self) -> nn.Module | None:
        return self._judge

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not told: transformers counts the parameters for it by walking through all modules, in every step."""
        return 0

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Not learned scales: they would shrink what their block stores, whose weights decay already."""
        names: list[str] = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in names if "_quantizer." not in name]

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Held-out figures as ``eval_*``; the first ones, before any step, are those to beat."""
        started, step = time.monotonic(), self.state.global_step
        self.model.eval()
        judge = self.judge()
        with self.autocast_smart_context_manager():
            figures = measure_held_out(
                Judged(run=self.model_wrapped_or_model(), inner=self.inner()),
                Judged(run=judge, inner=self.accelerator.unwrap_model(judge)) if judge is not None else None,
                self.held_out_sequences,
                device=self.args.device,
                rank=self.args.process_index,
                world=self.args.world_size,
                total=lambda sums: self.accelerator.reduce(sums, "sum"),
            )
        _require_finite(figures, step, "held-out figures")
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        metrics["eval_seconds"] = round(time.monotonic() - started, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.state.best_metric is None:
            self.state.best_metric, self.state.best_global_step = metrics[f"eval_{self.metric}"], step
            self._save_checkpoint(self.model, None)
        return metrics

    @property
    def metric(self) -> str:
        return str(self.args.metric_for_best_model)

    def model_wrapped_or_model(self) -> Any:
        """What a forward pass goes through: the wrapper where there is one."""
        wrapped = getattr(self, "model_wrapped", None)
        return self.model if wrapped is None else wrapped

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better: bool = super()._determine_best_metric(metrics, trial)  # type: ignore[misc]
        if out_of_patience(self.training, self.state.global_step, self.state.best_global_step or 0):
            self.control.should_training_stop = True
        return better

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Refuses what is not finite; the history is in metrics.jsonl, not in every checkpoint."""
        _require_finite(
            {name: logs[name] for name in ("loss", "grad_norm") if name in logs},
            self.state.global_step,
            "training",
        )
        super().log(logs, start_time)  # type: ignore[misc]
        self.state.log_history.clear()


class DistillationTrainer(_HeldOut, QADTrainer):
    """KL(teacher || student) over all next-token positions, in float32, and of routers where they are listened to."""

    _last_teacher_outputs: Any
    routers: tuple[RouterLogits, RouterLogits] | None = None

    def judge(self) -> nn.Module | None:
        self._ensure_teacher_prepared()
        teacher: nn.Module = self._teacher_model
        return teacher

    def _standard_kd_loss(self, outputs: Any, labels: Any, **options: Any) -> torch.Tensor:
        teacher, self._last_teacher_outputs = self._last_teacher_outputs, None
        loss = distillation_loss(self._kd_criterion, outputs.logits, teacher.logits)
        if self.routers is None:
            return loss
        mine, theirs = (item.take() for item in self.routers)
        return loss + self.training.router_weight * router_divergence(mine, theirs)


class FinetuningTrainer(_HeldOut, QATTrainer):
    """Next-token cross entropy; a teacher only judges."""

    _judge_is_prepared = False

    def judge(self) -> nn.Module | None:
        if self._judge is not None and not self._judge_is_prepared:
            self._judge, self._judge_is_prepared = self._prepare_model(self._judge), True
        return self._judge


def out_of_patience(training: Training, step: int, best_step: int) -> bool:
    """Whether so many evaluations in a row were no better than the best."""
    return training.patience > 0 and step - best_step >= training.patience * training.evaluate_every


def total_steps(training: Training, sequences: int) -> int:
    """Optimizer steps of the whole training; ``sequences``: rows to train on."""
    if training.steps:
        return training.steps
    passes = math.ceil(sequences / (training.batch_size * training.devices))
    return max(1, math.ceil(training.epochs * math.ceil(passes / training.accumulate)))


def training_arguments(
    training: Training, work: Path, *, steps: int, device: torch.device, judged: bool, resumed: bool
) -> TrainingArguments:
    fsdp2 = training.devices > 1 and training.parallel == "fsdp2"
    arguments = TrainingArguments(
        output_dir=str(work / CHECKPOINTS),
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulate,
        max_steps=steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(training.warmup * steps),
        adam_beta2=ADAM_BETA2,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bf16",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        seed=training.seed,
        data_seed=training.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        eval_strategy="steps",
        eval_steps=training.evaluate_every,
        eval_on_start=not resumed,
        save_strategy="steps",
        save_steps=training.evaluate_every,
        metric_for_best_model="kl" if judged else "ce",
        greater_is_better=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        fsdp=fsdp2,
        fsdp_config=dict(FSDP2) if fsdp2 else None,
        # An expert that no token of a device chose has no gradient there.
        ddp_find_unused_parameters=True if training.devices > 1 and training.parallel == "ddp" else None,
    )
    if device.type == "cuda" and training.devices == 1:
        torch.cuda.set_device(device)
        arguments._n_gpu = 1  # else all visible ones, in the DataParallel of one process
    return arguments


def make_trainer(
    model: nn.Module,
    teacher: nn.Module | None,
    training: Training,
    arguments: TrainingArguments,
    *,
    train: torch.Tensor,
    held_out: torch.Tensor,
    routers: tuple[RouterLogits, RouterLogits] | None = None,
) -> Any:
    """The trainer of ``training.method``; ``train`` [n, T] and ``held_out`` [m, T] int64."""
    options = dict(
        model=model, args=arguments, train_dataset=train, eval_dataset=held_out, data_collator=_collate
    )
    with _without_pickled_models():
        if training.method == "qad":
            distil = {"teacher_model": teacher, "temperature": training.temperature}
            trainer: Any = DistillationTrainer(**options, distill_args=distil)
            trainer.routers = routers
        else:
            trainer = FinetuningTrainer(**options)
    trainer.configure(training, teacher, held_out)
    trainer.remove_callback(PrinterCallback)  # stdout is for data
    return trainer


def _collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    stacked = torch.stack(rows)
    return {"input_ids": stacked, "labels": stacked.clone()}


@contextlib.contextmanager
def _without_pickled_models() -> Iterator[None]:
    """ModelOpt's trainers patch transformers so that every later ``from_pretrained`` of this process would read a
    ``modelopt_state.pth`` that lies beside the weights."""
    original = modelopt_plugin.enable_huggingface_checkpointing
    modelopt_plugin.enable_huggingface_checkpointing = lambda: None
    try:
        yield
    finally:
        modelopt_plugin.enable_huggingface_checkpointing = original


@contextlib.contextmanager
def prepared(model: Any, teacher: Any, training: Training) -> Iterator[None]:
    """For the time of a training: no key-value caches, no router loss unless routers are trained, and a rare
    ``gc.collect``, which ModelOpt's trainers call in every step: of the demo it takes 20 ms, of some 250."""
    configs = [item.config.get_text_config() for item in (model, teacher) if item is not None]
    before = [(config, config.use_cache, getattr(config, "output_router_logits", None)) for config in configs]
    for config in configs:
        config.use_cache = False
        if Role.ROUTER.value not in training.roles and hasattr(config, "output_router_logits"):
            config.output_router_logits = False
    gc.collect()
    gc.freeze()
    modelopt_trainer.gc = _RareCollection()
    try:
        yield
    finally:
        modelopt_trainer.gc = gc
        gc.unfreeze()
        for config, use_cache, router in before:
            config.use_cache = use_cache
            if router is not None:
                config.output_router_logits = router


class _RareCollection:
    """What ModelOpt's trainers find under the name ``gc``: every ``GC_STEPS``-th call collects."""

    def __init__(self) -> None:
        self._calls = 0

    def collect(self) -> int:
        self._calls += 1
        return gc.collect() if self._calls % GC_STEPS == 0 else 0


def _require_finite(figures: dict[str, Any], step: int, what: str) -> None:
    bad = {name: float(value) for name, value in figures.items() if not math.isfinite(float(value))}
    if bad:
        found = ", ".join(f"{name} {value}" for name, value in bad.items())
        raise ToolchainError(
            f"{what} at step {step}: {found}. Nothing was written",
            hint="train with a smaller --learning-rate, or --precision fp32; look at the data around this step",
            code="TC-254",
        )
