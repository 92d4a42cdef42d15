"""transformers' Trainer with checkpoints of ``state.py``: atomic, without pickle, independent of the device count."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.core.files import read_json
from toolchain.qat import state


class SafeCheckpoints:
    """Overrides the Trainer's saving and loading. To be mixed in before it."""

    args: Any
    state: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    keep_checkpoints: int = 2

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """All ranks take part: parameters may have to be gathered, and each has generators of its own."""
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        partial = final.with_name(f".{final.name}.partial")
        first = self.args.process_index == 0
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        inner = self.inner()
        trained = state.parameter_state(inner)
        moments, groups = state.optimizer_state(self.optimizer, inner)
        if first:
            state.write_tensors(partial / state.TRAINED, trained)
            state.write_optimizer(partial, moments, groups, self.lr_scheduler.state_dict())
            self.state.save_to_json(str(partial / state.TRAINER_STATE))
        state.write_rng(partial, self.args.process_index)
        self.accelerator.wait_for_everyone()
        if first:
            _appear(partial, final)
            state.rotate(final.parent, self.keep_checkpoints, self.state.best_global_step or 0)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        inner = self.model if model is None else model
        state.restore_parameters(
            self.accelerator.unwrap_model(inner), Path(resume_from_checkpoint) / state.TRAINED
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.restore_optimizer(self.optimizer, self.inner(), Path(checkpoint))
            self.lr_scheduler.load_state_dict(read_json(Path(checkpoint) / state.SCHEDULER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.restore_rng(Path(checkpoint), self.args.process_index)

    def _save_scaler(self, output_dir: str) -> None:
        """Gradients of bf16 are not scaled."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Gradients of bf16 are not scaled."""

    def _save_modelopt_state_with_weights(self) -> None:
        """ModelOpt would pickle the quantizers here; the start state has them."""

    def inner(self) -> nn.Module:
        """The model without the wrappers of several devices; under FSDP2 its parameters stay cut."""
        unwrapped: nn.Module = self.accelerator.unwrap_model(self.model)
        return unwrapped

    def load_best(self) -> int:
        """Put the weights of the best evaluation into the model and return its step."""
        step = int(self.state.best_global_step or 0)
        path = Path(self.args.output_dir) / f"checkpoint-{step}" / state.TRAINED
        with torch.no_grad():
            state.restore_parameters(self.inner(), path)
        return step


def _appear(partial: Path, final: Path) -> None:
    """Rename, replacing a checkpoint of the same step that an earlier run left."""
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
