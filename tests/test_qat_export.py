"""What was trained is what ships: the student in memory, the written directory and the checkpoint compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.formats import FORMATS
from toolchain.modeling.loading import load_checkpoint
from toolchain.plan.types import Plan, Training
from toolchain.qat.export import export_trained
from toolchain.qat.roles import trainable_parameters
from toolchain.qat.student import Student, make_student
from toolchain.qat.trained import write_trained

CPU = torch.device("cpu")
NAMES = tuple(item.name for item in FORMATS)
Tiny = Callable[[str], Path]


def training_plan(source: Path, format_name: str, *, roles: tuple[str, ...] = (), **options: Any) -> Plan:
    recipe = {"recipe": "max"} if format_name == "int4_gptq" else {}  # GPTQ chooses codes after calibration
    plan = plan_for(source, format_name, **{"policy": "all-linear", **recipe, **options})
    return replace(plan, training=Training(data=("nothing",), roles=roles))


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 260, (2, 48), generator=torch.Generator().manual_seed(seed))


def train(student: Student, steps: int = 2) -> None:
    """Plain descent on the next token, in steps that move every weight by up to 0.01: far beyond rounding."""
    parameters = trainable_parameters(student)
    for step in range(steps):
        batch = tokens(step)
        logits = student.model(batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        with torch.no_grad():
            for parameter in parameters.values():
                if parameter.grad is not None:
                    largest = parameter.grad.abs().amax().clamp(min=1e-30)
                    parameter.sub_(0.01 * parameter.grad / largest)
                    parameter.grad = None


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(tokens(9)).logits
    return found


def trained_and_exported(plan: Plan, tmp_path: Path) -> tuple[Student, Path, Path]:
    student = make_student(plan, device="cpu")
    train(student)
    write_trained(student, tmp_path / "trained", {"steps": 2})
    export_trained(plan, tmp_path / "trained", tmp_path / "out", device="cpu")
    return student, tmp_path / "trained", tmp_path / "out"


def check(student: Student, trained: Path, output: Path) -> None:
    """Bit for bit in float32; and the bytes are sound, against the trained model."""
    ours = load_checkpoint(output, device=CPU, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(student.model))
    verdict = audit(output, against=trained)
    assert verdict.passed, [str(finding) for finding in verdict.findings]


@pytest.mark.parametrize("format_name", NAMES)
@pytest.mark.parametrize("kind", ["qwen3_moe", pytest.param("llama", marks=pytest.mark.slow)])
def test_the_checkpoint_computes_what_the_student_computes(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str
) -> None:
    plan = training_plan(tiny(kind), format_name)
    student, trained, output = trained_and_exported(plan, tmp_path)
    check(student, trained, output)
    before, after = CheckpointReader(tiny(kind)), CheckpointReader(trained)
    assert before.infos.keys() == after.infos.keys()
    for name, info in before.infos.items():
        assert (info.dtype, info.shape) == (after.infos[name].dtype, after.infos[name].shape)
