"""Routers that are distilled: what is listened to are the routers' own logits, and the loss is their divergence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.students import tokens
from tests.tiny import KINDS
from tests.training import training_plan
from toolchain.core.errors import ToolchainError
from toolchain.modeling.experts import UnfusedExperts
from toolchain.modeling.loading import load_source
from toolchain.qat.data import Sequences
from toolchain.qat.roles import trainable_parameters
from toolchain.qat.routers import RouterLogits, router_divergence
from toolchain.qat.run import run_training
from toolchain.qat.session import Session
from toolchain.qat.student import make_student
from toolchain.quantize.job import family_of

CPU = torch.device("cpu")
Tiny = Callable[[str], Path]


def loaded(source: Path) -> tuple[Any, RouterLogits]:
    model = load_source(source, device=CPU, dtype=torch.float32).eval()
    return model, RouterLogits(model, family_of(model, source))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_logits_are_those_that_transformers_reports(tiny: Tiny, kind: str) -> None:
    model, routers = loaded(tiny(kind))
    with torch.no_grad():
        expected = model(tokens(), output_router_logits=True).router_logits
    found = routers.take()
    assert len(found) == len(expected) and not routers.last
    for ours, theirs in zip(found.values(), expected, strict=True):
        # Some of transformers' routers report what softmax made of them.
        torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1) if theirs.min() < 0 else theirs)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_mixture_has_one_router_per_layer_of_experts(tiny: Tiny, kind: str) -> None:
    """Found by role and shape, in every family; dense ones have none, and gates of one column are none."""
    model, routers = loaded(tiny(kind))
    experts = [item for item in model.modules() if isinstance(item, UnfusedExperts)]
    assert len(routers.paths) == len(experts)
    with torch.no_grad():
        model(tokens())
    assert [found.shape[-1] for found in routers.take().values()] == [item.num_experts for item in experts]


def test_the_divergence_is_torchs_own() -> None:
    generator = torch.Generator().manual_seed(0)
    mine, theirs = ({name: torch.randn(7, 8, generator=generator) for name in "ab"} for _ in range(2))
    expected = sum(
        torch.nn.functional.kl_div(
            mine[name].log_softmax(-1), theirs[name].log_softmax(-1), reduction="batchmean", log_target=True
        )
        for name in "ab"
    )
    torch.testing.assert_close(router_divergence(mine, theirs), expected / 2)
    with pytest.raises(ToolchainError) as error:
        router_divergence(mine, {"a": theirs["a"]})
    assert error.value.code == "TC-266"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_a_step_has_both_parts(tiny: Tiny, tmp_path: Path, checkpointing: bool) -> None:
    """By hand, on the weights before the step; layers that are computed twice count once."""
    plan = training_plan(
        tiny("qwen3_moe"), steps=1, batch_size=2, router_weight=3.0, gradient_checkpointing=checkpointing
    )
    student = make_student(plan, device="cpu")
    teacher = load_source(tiny("qwen3_moe"), device=CPU, dtype=torch.float32).eval().requires_grad_(False)
    trainable_parameters(student)
    listening = RouterLogits(student.model, student.family), RouterLogits(teacher, student.family)
    data = tokens()
    with torch.no_grad():
        q, p = (model(data).logits[:, :-1].log_softmax(-1) for model in (student.model, teacher))
    routers = router_divergence(*(item.take() for item in listening))
    expected = float((p.exp() * (p - q)).sum(-1).mean() + 3 * routers)
    assert plan.training is not None and float(routers) > 0
    session = Session(directory=tmp_path)
    sequences = Sequences(train=data, held_out=tokens(1), identity={})
    run_training(student.model, teacher, sequences, plan.training, session, device=CPU, routers=listening)
    losses = [line["loss"] for line in session.metrics.lines() if line["kind"] == "step"]
    assert losses == pytest.approx([expected], rel=1e-4)
