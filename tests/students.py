"""Students for tests: plans that train, a few steps of plain descent, and what the student and its files compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.planning import plan_for
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.plan.steps import Training
from toolchain.plan.types import Plan
from toolchain.qat.roles import trainable_parameters
from toolchain.qat.student import Student


def student_plan(source: Path, format_name: str, *, roles: tuple[str, ...] = (), **options: Any) -> Plan:
    recipe = {"recipe": "max"} if format_name == "int4_gptq" else {}  # GPTQ chooses codes after calibration
    plan = plan_for(source, format_name, **{"policy": "all-linear", **recipe, **options})
    return replace(plan, training=Training(data=("nothing",), roles=roles))


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 260, (2, 48), generator=torch.Generator().manual_seed(seed))


def train(student: Student, steps: int = 2, learned: dict[str, torch.nn.Parameter] | None = None) -> None:
    """Plain descent on the next token, in steps that move every weight by up to 0.01: far beyond rounding."""
    parameters = {**trainable_parameters(student), **(learned or {})}
    for parameter in (learned or {}).values():
        parameter.requires_grad_(True)
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


def assert_plain(student: Student, trained: Path) -> None:
    """transformers alone, in float32, against the student with its quantizers off but for channel scales."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32, experts_implementation="eager")
    exact = without_rounding(student)
    torch.testing.assert_close(logits(plain), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


def without_rounding(student: Student) -> torch.Tensor:
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantizers = [item for item in student.model.modules() if isinstance(item, TensorQuantizer)]
    enabled = [item for item in quantizers if item.is_enabled]
    for item in enabled:
        item.disable()
    try:
        return logits(student.model)
    finally:
        for item in enabled:
            item.enable()


def differing(before: Path, after: Path) -> set[str]:
    """Names of tensors whose bits are not those of ``before``."""
    old, new = CheckpointReader(before), CheckpointReader(after)
    assert old.infos.keys() == new.infos.keys()
    return {name for name in old.infos if not torch.equal(old.get(name), new.get(name))}
