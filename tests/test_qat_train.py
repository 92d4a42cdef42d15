"""Training with fake quantization: what is learnt, judged, written down and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.tiny import make_tiny
from tests.training import Notes, training_plan
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.plan.types import Plan
from toolchain.qat import run as run_module
from toolchain.qat.control import train_control
from toolchain.qat.data import load_sequences
from toolchain.qat.job import train
from toolchain.qat.losses import distillation_loss
from toolchain.qat.run import explained_memory
from toolchain.qat.student import make_student

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, dict[str, Any], Notes]:
    """Plan, directory with ``work`` and ``trained``, record and notes of a distillation. Read only."""
    root, notes = tmp_path_factory.mktemp("qad"), Notes()
    plan = training_plan(tiny("qwen3_moe"))
    record = train(plan, root / "work", root / "trained", device="cpu", progress=notes)
    return plan, root, record, notes


def lines_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def losses_of(work: Path) -> list[float]:
    return [line["loss"] for line in lines_of(work) if line["kind"] == "step"]


def logits_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=rows, use_cache=False).logits.float()


def test_held_out_divergence_falls_and_is_the_definition(trained: Any) -> None:
    """Before: teacher || PTQ student; after: teacher || the weights as written, quantized. Both from raw logits."""
    from transformers import AutoModelForCausalLM

    plan, _, record, _ = trained
    figures = record["held_out"]
    assert record["improved"] and figures["after"]["kl"] < 0.95 * figures["before"]["kl"]
    rows = load_sequences(plan.training, Path(plan.model)).held_out
    teacher = logits_of(AutoModelForCausalLM.from_pretrained(plan.model, dtype=torch.float32).eval(), rows)
    student = logits_of(make_student(plan, device="cpu").model.eval(), rows)
    p, q = (torch.distributions.Categorical(logits=item[:, :-1].double()) for item in (teacher, student))
    assert figures["before"]["kl"] == pytest.approx(
        float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-3
    )
    ce = functional.cross_entropy(student[:, :-1].flatten(0, 1).double(), rows[:, 1:].flatten())
    assert figures["before"]["ce"] == pytest.approx(float(ce), rel=1e-3)
    same = (teacher.argmax(-1) == student.argmax(-1))[:, :-1].float().mean()
    assert figures["before"]["top1"] == pytest.approx(float(same), abs=0.01)
    assert 0.5 < figures["before"]["router"] <= 1


def test_only_matrices_of_the_trained_roles_change(trained: Any) -> None:
    from safetensors.torch import load_file

    plan, root, _, _ = trained
    before = load_file(Path(plan.model) / "model.safetensors")
    after = load_file(root / "trained" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    quantized = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
    assert changed and all(name.split(".")[-2] in quantized or "proj" in name for name in changed)
    assert not any("mlp.gate.weight" in name or "norm" in name or "embed" in name for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_metrics_tensorboard_and_record_tell_the_same(trained: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, root, record, notes = trained
    steps = [line for line in lines_of(root / "work") if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert {line["tokens"] for line in steps} == {4 * 32} and record["tokens"] == 6 * 4 * 32
    assert all(line["grad_norm"] > 0 and line["seconds"] > 0 for line in steps)
    held_out = {line["step"]: line["kl"] for line in lines_of(root / "work") if line["kind"] == "held_out"}
    assert list(held_out) == [0, 3, 6]
    assert record["best_step"] == min(held_out, key=lambda step: held_out[step])
    events = EventAccumulator(str(root / "work" / "tensorboard")).Reload()
    assert [item.step for item in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [item.value for item in events.Scalars("eval/kl")] == pytest.approx(
        list(held_out.values()), rel=1e-4
    )
    assert any("step 3 of 6" in line and "KL" in line for line in notes.lines)
    assert json.loads((root / "trained" / "training.json").read_text())["record"]["steps"] == 6


def test_nothing_is_pickled_and_nothing_printed(
    trained: Any, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, root, _, _ = trained
    suffixes = {
        path.suffix for path in (root / "work").rglob("*") if path.is_file() and "events" not in path.name
    }
    assert suffixes == {".json", ".jsonl", ".safetensors"}
    train(training_plan(tiny("qwen3_moe"), steps=1), tmp_path / "work", tmp_path / "out", device="cpu")
    assert capfd.readouterr().out == ""


def test_the_first_loss_is_the_divergence_from_the_teacher(trained: Any) -> None:
    """Of the batch that was seen: found again by its value among all possible orders would be guessing, so all
    sequences are one batch."""
    plan, root, _, _ = trained
    rows = load_sequences(plan.training, Path(plan.model)).train
    one = replace(plan, training=replace(plan.training, steps=1, batch_size=4))
    rows = load_sequences(one.training, Path(plan.model)).train
    assert len(rows) == 4
    train(one, root / "one" / "work", root / "one" / "out", device="cpu")
    from transformers import AutoModelForCausalLM

    teacher = logits_of(AutoModelForCausalLM.from_pretrained(plan.model).eval(), rows)[:, :-1]
    student = logits_of(make_student(plan, device="cpu").model.eval(), rows)[:, :-1]
    kl = functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    )
    assert losses_of(root / "one" / "work")[0] == pytest.approx(float(kl.sum(-1).mean()), rel=0.02)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_sliced_loss_and_its_gradient_are_those_of_the_whole(temperature: float) -> None:
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    torch.manual_seed(0)
    student, teacher = torch.randn(3, 9, 50, requires_grad=True), torch.randn(3, 9, 56)
    criterion = LogitsDistillationLoss(temperature=temperature, reduction="none")
    loss = distillation_loss(criterion, student, teacher, rows=5)
    (gradient,) = torch.autograd.grad(loss, student)
    p = (teacher[:, :-1, :50] / temperature).softmax(-1)
    log_q = (student[:, :-1] / temperature).log_softmax(-1)
    expected = temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


def test_checkpointed_and_accumulated_passes_give_the_same_curve(trained: Any, tmp_path: Path) -> None:
    plan, root, _, _ = trained
    expected = losses_of(root / "work")
    changes: dict[str, Any] = {"gradient_checkpointing": True, "batch_size": 2, "accumulate": 2}
    other = replace(plan, training=replace(plan.training, **changes))
    train(other, tmp_path / "work", tmp_path / "out", device="cpu")
    assert losses_of(tmp_path / "work") == pytest.approx(expected, rel=1e-3)


def test_bf16_trains(trained: Any, tmp_path: Path) -> None:
    plan, _, _, _ = trained
    other = replace(plan, training=replace(plan.training, precision="bf16"))
    record = train(other, tmp_path / "work", tmp_path / "out", device="cpu")
    assert record["improved"]


def test_finetuning_without_patience_loads_no_teacher(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(run_module, "load_teacher", refuse)
    plan = training_plan(tiny("qwen3_moe"), method="qat", patience=0)
    record = train(plan, tmp_path / "work", tmp_path / "out", device="cpu")
    assert record["metric"] == "ce" and "kl" not in record["held_out"]["before"]
    assert record["held_out"]["after"]["ce"] < record["held_out"]["before"]["ce"]


def test_the_start_is_kept_where_training_never_beats_it(tiny: Tiny, tmp_path: Path) -> None:
    """At a learning rate that breaks the model, stopped after ``patience`` evaluations."""
    from safetensors.torch import load_file

    source, notes = tiny("qwen3_moe"), Notes()
    plan = training_plan(source, learning_rate=0.3, steps=40, evaluate_every=1, patience=2)
    record = train(plan, tmp_path / "work", tmp_path / "out", device="cpu", progress=notes)
    assert (record["stopped"], record["steps"], record["best_step"]) == ("patience", 2, 0)
    assert not record["improved"] and any("gained nothing" in line for line in notes.lines)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_not_finite_ends_it_and_writes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    plan = training_plan(tiny("qwen3_moe"), learning_rate=1e37, max_grad_norm=0.0, roles=("norm",))
    with pytest.raises(ToolchainError, match=r"step [12]") as error:
        train(plan, tmp_path / "work", tmp_path / "out", device="cpu")
    assert error.value.code == "TC-254"
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_another_tokenizer_is_refused_before_loading(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_tiny("qwen3", tmp_path / "teacher")
    file = teacher / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(tokenizer))
    monkeypatch.setattr("toolchain.qat.job.make_student", lambda *a, **o: pytest.fail("a model was loaded"))
    plan = training_plan(tiny("qwen3_moe"), teacher=str(teacher))
    with pytest.raises(UsageError, match=r"token \d+ is 'B', in the student 'A'") as error:
        train(plan, tmp_path / "work", tmp_path / "out", device="cpu")
    assert error.value.code == "TC-253"


def test_memory_that_runs_out_says_what_needs_less(tiny: Tiny) -> None:
    training = training_plan(tiny("qwen3_moe"), batch_size=8, accumulate=2).training
    assert training is not None
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("not enough memory: you tried"),
    ):
        with pytest.raises(ToolchainError) as caught, explained_memory(training):
            raise error
        assert caught.value.code == "TC-255"
        assert "--batch-size 4 --accumulate 4" in caught.value.hint
    with pytest.raises(RuntimeError, match="shapes"), explained_memory(training):
        raise RuntimeError("shapes differ")


def test_the_control_moves_away_from_the_untouched_model(trained: Any, tmp_path: Path) -> None:
    """Same data, steps and learning rate; its loss is the cross entropy of a model without quantization."""
    from transformers import AutoModelForCausalLM

    plan, root, _, _ = trained
    found = train_control(plan, tmp_path, device="cpu")
    assert found["steps"] == 6 and found["data"] == json.loads(json.dumps(found["data"]))
    assert found["before"]["kl"] == 0 < found["after"]["kl"]
    rows = load_sequences(plan.training, Path(plan.model)).held_out
    logits = logits_of(AutoModelForCausalLM.from_pretrained(plan.model, dtype=torch.float32).eval(), rows)
    ce = functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert found["before"]["ce"] == pytest.approx(float(ce), rel=1e-4)
    rates = [
        [line["learning_rate"] for line in lines_of(work) if line["kind"] == "step"]
        for work in (tmp_path, root / "work")
    ]
    assert rates[0] == rates[1]
