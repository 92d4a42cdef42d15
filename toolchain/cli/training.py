"""Options of training with fake quantization, and what it was planned to take and gave, for people."""

from __future__ import annotations

from typing import Any

import click

from toolchain.cli.options import stack
from toolchain.cli.output import size, table
from toolchain.core.roles import Role
from toolchain.pipeline.training_request import LEARNING_RATE, LORA_LEARNING_RATE, LORA_RANK
from toolchain.plan.steps import Training
from toolchain.plan.training import METHODS, PARALLEL, PRECISIONS
from toolchain.plan.types import Plan

data_options = stack(
    click.option(
        "--data",
        multiple=True,
        required=True,
        help="Training text: a text, JSONL or Parquet file (text, messages, or input_ids of this tokenizer), a "
        "directory of them, or a hub data set name. Several times: all of them.",
    ),
    click.option(
        "--held-out",
        multiple=True,
        help="Text that early stopping looks at. Default: whole documents of --data, which are then not trained on.",
    ),
    click.option(
        "--held-out-share",
        type=float,
        default=Training.held_out_share,
        show_default=True,
        help="Most documents of --data to hold out, as a share.",
    ),
    click.option(
        "--held-out-tokens",
        type=int,
        default=Training.held_out_tokens,
        show_default=True,
        help="Tokens to judge at each evaluation.",
    ),
    click.option(
        "--length", type=int, default=Training.length_tokens, show_default=True, help="Tokens of a sequence."
    ),
)
method_options = stack(
    click.option(
        "--method",
        type=click.Choice(METHODS),
        default=Training.method,
        show_default=True,
        help="qad: the teacher's distribution of the next token (KL); qat: the text's own next token.",
    ),
    click.option(
        "--teacher",
        help="Directory or hub id with the same tokenizer. Default: the unquantized MODEL itself.",
    ),
    click.option(
        "--temperature",
        type=float,
        default=Training.temperature,
        show_default=True,
        help="Of both softmaxes.",
    ),
    click.option(
        "--router-weight",
        type=float,
        default=Training.router_weight,
        show_default=True,
        metavar="W",
        help="Of the divergence between the routers of teacher and student (mean of the layers), beside that of the "
        "next token.",
    ),
    click.option(
        "--train",
        multiple=True,
        metavar="ROLE",
        help=f"What is trained: {', '.join(role.value for role in Role if role is not Role.OTHER)}; several times. "
        "Default: the parts that are quantized.",
    ),
    click.option(
        "--lora",
        is_flag=True,
        help="Train adapters on the matrices of the trained parts, and merge them in the end.",
    ),
    click.option(
        "--lora-rank", type=int, metavar="R", help=f"Rank of the adapters. Default with --lora: {LORA_RANK}."
    ),
    click.option(
        "--lora-alpha", type=float, metavar="A", help="Adapters count A / R. Default: twice the rank."
    ),
    click.option("--learned-scales", is_flag=True, help="Learn the block scales, too (LSQ; NVFP4 weights)."),
)
step_options = stack(
    click.option(
        "--steps", type=int, default=Training.steps, show_default=True, help="Optimizer steps; 0: --epochs."
    ),
    click.option(
        "--epochs", type=float, default=Training.epochs, show_default=True, help="Passes over --data."
    ),
    click.option(
        "--batch-size",
        type=int,
        default=Training.batch_size,
        show_default=True,
        help="Sequences on one device.",
    ),
    click.option(
        "--accumulate",
        type=int,
        default=Training.accumulate,
        show_default=True,
        help="Batches per optimizer step.",
    ),
    click.option(
        "--learning-rate",
        type=float,
        help=f"Highest. Default: {LEARNING_RATE:g}, with --lora {LORA_LEARNING_RATE:g}.",
    ),
    click.option(
        "--warmup",
        type=float,
        default=Training.warmup,
        show_default=True,
        help="Share of the steps in which it rises.",
    ),
    click.option(
        "--weight-decay", type=float, default=Training.weight_decay, show_default=True, help="Of AdamW."
    ),
    click.option(
        "--max-grad-norm",
        type=float,
        default=Training.max_grad_norm,
        show_default=True,
        help="Gradients are cut to it.",
    ),
    click.option(
        "--evaluate-every",
        type=int,
        default=Training.evaluate_every,
        show_default=True,
        help="Steps between evaluations, and between checkpoints.",
    ),
    click.option(
        "--patience",
        type=int,
        default=Training.patience,
        show_default=True,
        help="Stop after so many evaluations without a better held-out KL; 0: never.",
    ),
)
device_options = stack(
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        help="Of the forward pass. Default: bf16 on GPUs, fp32 on CPUs.",
    ),
    click.option(
        "--gradient-checkpointing", is_flag=True, help="Compute activations twice instead of keeping them."
    ),
    click.option(
        "--devices", type=int, default=Training.devices, show_default=True, help="Processes, one per GPU."
    ),
    click.option(
        "--parallel",
        type=click.Choice(PARALLEL),
        default=Training.parallel,
        show_default=True,
        help="A copy on each device, or weights, gradients and moments cut over them.",
    ),
    click.option(
        "--keep-checkpoints",
        type=int,
        default=Training.keep_checkpoints,
        show_default=True,
        help="Newest ones to keep.",
    ),
    click.option(
        "--from-step",
        type=int,
        metavar="N",
        help="Go on from the checkpoint of step N instead of the newest.",
    ),
)
training_options = stack(data_options, method_options, step_options, device_options)


def render_training(plan: Plan) -> str:
    """What is trained how, and what that takes; empty for a plan that trains nothing."""
    wanted = plan.training
    if wanted is None:
        return ""
    steps = f"{wanted.steps} steps" if wanted.steps else f"{wanted.epochs:g} epochs"
    adapters = (
        f", adapters of rank {wanted.lora_rank} (alpha {wanted.lora_alpha:g})" if wanted.lora_rank else ""
    )
    learned = ", learned block scales" if wanted.learned_scales else ""
    devices = f"{wanted.devices} devices ({wanted.parallel})" if wanted.devices > 1 else "one device"
    taught = f" from {wanted.teacher or 'the source'}" if wanted.method == "qad" else ""
    lines = [
        f"training: {wanted.method}{taught} of {', '.join(wanted.roles) or 'nothing'}{adapters}{learned}; {steps} of "
        f"{wanted.devices} x {wanted.batch_size} x {wanted.accumulate} sequences of {wanted.length_tokens} tokens, "
        f"learning rate {wanted.learning_rate:g}, {wanted.precision} on {devices}"
    ]
    figures = plan.estimates
    rows = [(name, size(count)) for name, count in figures.training_memory.items()]
    total = ("all, on the fullest device", size(figures.training_memory_bytes))
    return "\n".join([*lines, "", table(("memory to train", "bytes"), [*rows, total])]) if rows else lines[0]


def training_rows(manifest: dict[str, Any]) -> list[tuple[str, Any]]:
    """Rows of a summary: what was trained, and what it gave on held-out text."""
    made = manifest.get("training")
    if not made:
        return []
    name = made["metric"]
    before, after = made["held_out"]["before"][name], made["held_out"]["after"][name]
    return [
        (
            "training",
            f"{made['method']}, {made['steps']} steps, {made['tokens']:,} tokens, best step {made['best_step']}",
        ),
        ("held-out", f"{name.upper()} {before:.5f} -> {after:.5f}"),
    ]
