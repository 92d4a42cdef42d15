"""The mathematics of training against plain torch: losses, steps, averages, and that small updates are not lost."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.training import Notes, training_plan
from toolchain.evaluate.checkpoint import known_text
from toolchain.modeling.loading import load_source
from toolchain.plan.types import Plan
from toolchain.qat.data import Sequences, load_sequences
from toolchain.qat.export import export_trained
from toolchain.qat.heldout import Judged, measure_held_out
from toolchain.qat.job import train
from toolchain.qat.roles import trainable_parameters
from toolchain.qat.run import run_training
from toolchain.qat.session import Session
from toolchain.qat.student import make_student

CPU = torch.device("cpu")
Tiny = Callable[[str], Path]
TEMPERATURE = 2.0


def rows(count: int, seed: int = 0, length: int = 24) -> torch.Tensor:
    return torch.randint(4, 260, (count, length), generator=torch.Generator().manual_seed(seed))


def float_teacher(source: Path) -> nn.Module:
    return load_source(source, device=CPU, dtype=torch.float32).eval().requires_grad_(False)


def run(plan: Plan, model: nn.Module, teacher: nn.Module | None, data: torch.Tensor, work: Path) -> None:
    assert plan.training is not None
    sequences = Sequences(train=data, held_out=rows(2, seed=9), identity={})
    work.mkdir()
    run_training(model, teacher, sequences, plan.training, Session(directory=work), device=CPU)


def by_hand(plan: Plan, model: Any, teacher: Any, passes: list[torch.Tensor], steps: int) -> None:
    """Every step sees all ``passes``: the mean over all predicted positions, clipped, AdamW, warm-up and cosine."""
    training = plan.training
    assert training is not None
    parameters = [item for item in model.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    warm = round(training.warmup * steps)
    model.train()
    for step in range(steps):
        losses = []
        for batch in passes:
            logits = model(batch).logits[:, :-1]
            if teacher is None:
                losses.append(
                    functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
                )
                continue
            p = (teacher(batch).logits[:, :-1] / TEMPERATURE).softmax(-1)
            log_q = (logits / TEMPERATURE).log_softmax(-1)
            losses.append(TEMPERATURE**2 * (p * (p.log() - log_q)).sum())
        (sum(losses) / sum(batch[:, 1:].numel() for batch in passes)).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        done = max(0, step - warm) / max(1, steps - warm)
        share = step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = training.learning_rate * share
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("method", "checkpointing"), [("qad", False), ("qad", True), ("qat", False)])
def test_a_training_is_the_loop_that_its_settings_describe(
    tiny: Tiny, tmp_path: Path, method: str, checkpointing: bool
) -> None:
    """Two accumulated passes of two sequences; all four are in every step, so that their order does not matter."""
    steps = 4
    plan = training_plan(
        tiny("qwen3_moe"), method=method, temperature=TEMPERATURE, steps=steps, batch_size=2, accumulate=2,
        warmup=0.25, max_grad_norm=0.5, gradient_checkpointing=checkpointing, patience=5 if method == "qad" else 0,
    )  # fmt: skip
    student = make_student(plan, device="cpu")
    trainable_parameters(student)
    start = copy.deepcopy(student.model)
    expected = copy.deepcopy(student.model)
    teacher = float_teacher(tiny("qwen3_moe")) if method == "qad" else None
    data = rows(4)
    by_hand(plan, expected, teacher, [data[:2], data[2:]], steps)
    run(plan, student.model, teacher, data, tmp_path / "work")

    before, goal = dict(start.named_parameters()), dict(expected.named_parameters())
    for name, item in student.model.named_parameters():
        moved = float((goal[name] - before[name]).detach().norm())
        assert item.requires_grad == (moved > 0), name
        # Elements whose gradient is nearly nothing may step either way: Adam divides by it.
        assert float((item - goal[name]).detach().norm()) <= 0.02 * moved, name


def test_figures_are_means_over_tokens_however_they_are_divided(tiny: Tiny) -> None:
    """Sequences that fill no whole batch, over one, two and five devices: every token counts once."""
    plan = training_plan(tiny("qwen3_moe"))
    model, teacher = make_student(plan, device="cpu").model.eval(), float_teacher(tiny("qwen3_moe"))
    held_out = rows(7, seed=3)
    with torch.no_grad():
        mine, theirs = model(held_out).logits[:, :-1].double(), teacher(held_out).logits[:, :-1].double()
    log_p, log_q = theirs.log_softmax(-1), mine.log_softmax(-1)
    expected = {
        "ce": float(functional.nll_loss(log_q.flatten(0, 1), held_out[:, 1:].flatten())),
        "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "top1": float((mine.argmax(-1) == theirs.argmax(-1)).double().mean()),
    }
    students, teachers = Judged(run=model, inner=model), Judged(run=teacher, inner=teacher)
    for world in (1, 2, 5):
        summed = torch.zeros(())

        def add(sums: torch.Tensor) -> torch.Tensor:
            nonlocal summed
            summed = summed + sums
            return summed

        for rank in range(world):
            found = measure_held_out(
                students, teachers, held_out, device=CPU, rank=rank, world=world, total=add
            )
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert found["ppl"] == pytest.approx(math.exp(expected["ce"]), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_updates_far_below_bf16_are_kept(tiny: Tiny, tmp_path: Path, precision: str) -> None:
    """Steps of 1e-7 on weights of 0.1, of which bf16 has only every 4e-4th: master weights are float32."""
    plan = training_plan(
        tiny("llama"), precision=precision, learning_rate=1e-7, steps=3, evaluate_every=3, max_grad_norm=0.0
    )
    student = make_student(plan, device="cpu")
    trained = trainable_parameters(student)
    before = {name: item.detach().clone() for name, item in trained.items()}
    run(plan, student.model, float_teacher(tiny("llama")), rows(12), tmp_path / "work")
    for name, item in trained.items():
        assert item.dtype == torch.float32
        moved = (item - before[name]).detach().abs()
        assert 1e-8 < float(moved.max()) < 1e-6 and float((moved > 0).float().mean()) > 0.2, name


def test_the_last_evaluation_sees_no_training_text(tiny: Tiny, tmp_path: Path) -> None:
    """Documents go to one side only, whatever is repeated in them; searched token by token."""
    texts = [
        "\n".join(f"document {n}, line {m}: {hash_like(n * 100 + m)}" for m in range(12)) for n in range(40)
    ]
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:10]]))
    plan = training_plan(
        tiny("llama"), data=(str(data),), held_out=(), held_out_share=0.2, length_tokens=48, steps=5
    )
    found = load_sequences(plan.training, tiny("llama"))  # type: ignore[arg-type]
    trained = found.train.flatten().tolist()
    windows = {tuple(trained[at : at + 32]) for at in range(len(trained) - 31)}
    held_out = found.held_out.flatten().tolist()
    assert len(held_out) >= 48 and len(trained) >= 48
    assert not any(tuple(held_out[at : at + 32]) in windows for at in range(len(held_out) - 31))
    again = load_sequences(plan.training, tiny("llama"))  # type: ignore[arg-type]
    assert torch.equal(again.train, found.train) and torch.equal(again.held_out, found.held_out)
    other = load_sequences(replace(plan.training, seed=1), tiny("llama"))  # type: ignore[arg-type,type-var]
    assert not torch.equal(other.train, found.train)


def test_evaluation_says_when_it_judges_on_training_text(tiny: Tiny, tmp_path: Path) -> None:
    """The checkpoint carries a sketch of what it was trained on, as it does of what it was calibrated on."""
    source, notes = tiny("llama"), Notes()
    plan = training_plan(source, steps=1, evaluate_every=1, batch_size=16, length_tokens=128)
    train(plan, tmp_path / "work", tmp_path / "trained", device="cpu")
    export_trained(plan, tmp_path / "trained", tmp_path / "out", device="cpu")
    seen = load_sequences(plan.training, source).train.flatten().tolist()  # type: ignore[arg-type]
    other = rows(16, length=128).flatten().tolist()
    assert known_text(tmp_path / "out", other, notes)["training_overlap"] == 0 and not notes.lines
    # Of 128 windows of 32 tokens that begin in a sequence, 97 end in it.
    share = known_text(tmp_path / "out", seen, notes)["training_overlap"]
    assert share == pytest.approx(97 / 128, abs=0.1)
    assert any("TC-525" in line and "trained on" in line for line in notes.lines)


def hash_like(number: int) -> str:
    """Text that no other number gives."""
    return hashlib.sha256(str(number).encode()).hexdigest()
