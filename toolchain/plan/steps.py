"""What a plan does to weights beside quantizing them: zeros before, training after calibration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Structured sparsity of the quantized matrices: zeros that hardware skips, chosen before quantization."""

    pattern: str = "2:4"
    """At most so many of so many neighbours along the input dimension are not zero."""
    method: str = "magnitude"
    """``magnitude``, or ``sparsegpt``: by the second moments of the inputs, on the calibration data."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Fine-tuning with fake quantization, between calibration and export. Resolved: no field means "choose"."""

    data: tuple[str, ...]
    """Text or JSONL files, directories of them, or data set names, as ``Calibration.sources``."""
    held_out: tuple[str, ...] = ()
    """Where early stopping looks; empty: ``held_out_share`` of the documents of ``data``."""
    held_out_share: float = 0.05
    held_out_tokens: int = 16384
    """At most so many tokens are judged at each evaluation."""
    method: str = "qad"
    """``qad``: KL divergence from the teacher's logits; ``qat``: next-token cross entropy."""
    teacher: str = ""
    """Directory or hub id; empty: the unquantized source itself."""
    temperature: float = 1.0
    """Of both softmaxes of ``qad``."""
    router_weight: float = 0.0
    """Of the KL divergence between the routers of teacher and student, beside that of the logits."""
    roles: tuple[str, ...] = ()
    """Roles (``toolchain.core.roles``) whose weights are trained: those of the quantized matrices unless asked."""
    lora_rank: int = 0
    """Rank of the adapters on the trained matrices; 0: their weights themselves are trained."""
    lora_alpha: float = 0.0
    """Adapters are scaled by alpha / rank."""
    learned_scales: bool = False
    """Block scales are parameters, too (ModelOpt's LSQ)."""
    length_tokens: int = 512
    batch_size: int = 8
    """Sequences of one forward pass on one device."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    steps: int = 0
    """Optimizer steps; 0: ``epochs`` over the data."""
    epochs: float = 1.0
    learning_rate: float = 1e-5
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; it falls as a cosine afterwards."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "bf16"
    """Of the forward pass: ``bf16`` (autocast over float32 weights), or ``fp32``."""
    gradient_checkpointing: bool = False
    evaluate_every: int = 50
    """Optimizer steps between evaluations, and between checkpoints."""
    patience: int = 5
    """Evaluations without a better held-out KL after which training stops; 0: never."""
    keep_checkpoints: int = 2
    chat_template: bool = False
    seed: int = 0
    devices: int = 1
    parallel: str = "ddp"
    """With several devices: ``ddp`` (a copy on each), or ``fsdp2`` (weights, gradients and moments cut over them)."""

    def __post_init__(self) -> None:
        for name in ("data", "held_out", "roles"):  # as JSON has them
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def deciding(self) -> dict[str, Any]:
        """Fields that the result depends on."""
        return {name: value for name, value in asdict(self).items() if name != "keep_checkpoints"}
