"""What training over several devices needs of the Trainer beyond what Accelerate does by itself.

FSDP2 keeps the arithmetic of one device: weights are gathered in float32, quantized, and computed on under autocast.
Accelerate would cast them to bfloat16 before they are quantized.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from toolchain.core.progress import Progress

FSDP2: dict[str, Any] = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
}
"""``fsdp_config`` of transformers' TrainingArguments: every decoder layer is gathered when it is computed on."""


class AcrossDevices:
    """To be mixed in before transformers' Trainer."""

    args: Any
    accelerator: Any
    is_fsdp_enabled: bool
    _reduces_all = False

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        plugin = getattr(self.args, "fsdp_plugin_args", None)
        if plugin is None or self.args.world_size == 1:
            return
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU:
            # Accelerate 1.15 takes no plugin on CPUs (``AcceleratorState``) and would run DDP without a word, though
            # torch's ``fully_shard`` works with gloo.
            # Both: every new AcceleratorState takes it from the other.
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
            self.is_fsdp_enabled = True
        state.fsdp_plugin.mixed_precision_policy = None

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Accelerate wraps ``forward`` in autocast, but not under FSDP2."""
        return self.accelerator.autocast() if self.accelerator.is_fsdp2 else contextlib.nullcontext()

    def _prepare_model(self, model: nn.Module) -> nn.Module:
        """A frozen model beside the trained one (the teacher): cut under FSDP2, else each process has it whole. DDP
        refuses models without gradients."""
        if self.accelerator.is_fsdp2:
            unused = torch.optim.SGD([next(model.parameters())], lr=0.0)  # accelerate asks for one
            prepared: nn.Module = self.accelerator.prepare(model, unused)[0]
            return prepared
        whole: nn.Module = self.accelerator.prepare_model(model, evaluation_mode=True)
        return whole

    def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> Any:
        if self.accelerator.is_fsdp2 and not self._reduces_all:
            _reduce_unused(model)
            self._reduces_all = True
        return super().training_step(model, *arguments, **options)  # type: ignore[misc]


def _reduce_unused(model: nn.Module) -> None:
    """Let FSDP2 reduce zeros for experts that no token of this device chose: other devices wait for them."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reduce_scatter_unused_params(True)


class TellShare(TrainerCallback):
    """Says once, from the parameters themselves, how much of the weights this process holds."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            here = everywhere = 0
            for item in kwargs["model"].parameters():
                here += (item.to_local() if isinstance(item, DTensor) else item).numel()
                everywhere += item.numel()
            self.progress.note(
                f"{args.world_size} processes; each holds {here / everywhere:.0%} of the weights"
            )
