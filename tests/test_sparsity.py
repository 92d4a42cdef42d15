"""2:4 sparsity: ModelOpt's choices against the definition, which zeros survive, and how they are held in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.planning import plan_for, with_calibration
from tests.tiny import make_tiny
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.audit.sparsity import nonzero
from toolchain.codecs import Calibrated, get_codec
from toolchain.core.errors import ToolchainError
from toolchain.formats import FORMATS, get_format
from toolchain.plan.steps import Sparsity
from toolchain.plan.types import Plan
from toolchain.quantize import sparsity
from toolchain.quantize.job import calibrate, quantize
from toolchain.quantize.sparsity import hold_zeros, prune, pruned

Tiny = Callable[[str], Path]


def largest_two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The definition: of each four neighbours of a row the two largest magnitudes stay (none of them equal)."""
    groups = weight.unflatten(-1, (-1, 4))
    third = groups.abs().sort(-1, descending=True).values[..., 2:3]
    return torch.where(groups.abs() > third, groups, torch.zeros_like(groups)).flatten(-2)


def linear(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(columns, rows, bias=False)
    return made.to(dtype)


def sparse(plan: Plan, method: str = "magnitude") -> Plan:
    """``plan`` with sparsity, whoever gains from it."""
    return replace(plan, sparsity=Sparsity(method=method))


def test_magnitude_keeps_the_two_largest_of_four() -> None:
    one, two = linear(16, 64), linear(8, 32, seed=1)
    before = [one.weight.detach().clone(), two.weight.detach().clone()]
    parameter = one.weight
    prune({"one": one, "two": two}, "magnitude")
    for module, weight in zip((one, two), before, strict=True):
        assert torch.equal(module.weight, largest_two_of_four(weight))
        assert type(module) is nn.Linear and not hasattr(module, "is_sparse")
    assert one.weight is parameter  # optimizers, hooks and views of fused experts hold on to it
    assert torch.equal(pruned(before[0]), largest_two_of_four(before[0]))


def test_no_zero_is_negative() -> None:
    module = linear(16, 64, dtype=torch.bfloat16)
    streamed = pruned(module.weight.detach())
    prune({"it": module}, "magnitude")
    for weight in (module.weight.detach(), streamed):
        assert not torch.signbit(weight[weight == 0]).any()
    assert torch.equal(module.weight, streamed)


def textbook_mask(weight: torch.Tensor, inputs: torch.Tensor, damping: float) -> torch.Tensor:
    """SparseGPT (arXiv 2301.00774, algorithm 1) in float64: where numbers stay."""
    hessian = inputs.double().T @ inputs.double()
    hessian += torch.eye(len(hessian), dtype=torch.float64) * damping * hessian.diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    work, kept = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    for column in range(weight.shape[1]):
        if column % 4 == 0:
            group = slice(column, column + 4)
            loss = work[:, group] ** 2 / upper.diagonal()[group] ** 2
            kept[:, group].scatter_(1, loss.argsort(dim=1)[:, :2], False)
        error = torch.where(kept[:, column], 0.0, work[:, column]) / upper[column, column]
        work[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    return kept


def test_sparsegpt_masks_are_those_of_the_paper_and_nothing_else_changes() -> None:
    """ModelOpt takes the mask alone: what the paper adds to the numbers that stay is dropped."""
    module = linear(32, 64)
    before = module.weight.detach().clone()
    mixing = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(4)) @ mixing
    prune({"it": module}, "sparsegpt", lambda _: [module(part) for part in inputs.split(128)])
    kept = textbook_mask(before, inputs, damping=0.1)
    assert not torch.equal(kept, largest_two_of_four(before) != 0)  # or the inputs would decide nothing
    assert ((module.weight != 0) == kept).float().mean() > 0.995  # float32 against float64
    assert torch.equal(module.weight, torch.where(module.weight != 0, before, 0.0))


def test_a_matrix_that_modelopt_passes_over_is_an_error() -> None:
    with pytest.raises(ToolchainError, match=r"odd.*Skipping") as error:
        prune({"odd": linear(6, 64)}, "magnitude")
    assert error.value.code == "TC-264"


@pytest.mark.parametrize("format_name", [item.name for item in FORMATS])
def test_zeros_are_zeros_in_every_format(format_name: str) -> None:
    """Packed codes of zeros are zeros, and the audit sees exactly those numbers that decode to something else."""
    weight = pruned(torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).bfloat16())
    codec = get_codec(format_name)
    packed = codec.pack(
        weight, Calibrated(weight_amax=weight.abs().amax().float(), input_amax=torch.tensor(3.0))
    )
    seen = nonzero(get_format(format_name), packed["weight"])
    assert torch.equal(seen, codec.unpack(packed, torch.float32) != 0)
    assert not seen[weight == 0].any()
    assert seen.float().mean() > 0.4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: every ingredient of a recipe looks at it."""
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("small") / "model", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("format_name", "recipe"),
    [
        ("int4_awq", "awq+clip"),
        ("int8_sq", "smoothquant"),
        ("nvfp4", "local_hessian+gptq"),
        ("fp8", "gptq"),
        ("mxfp4", "mse"),
    ],
)
def test_zeros_survive_what_recipes_do(small: Path, tmp_path: Path, format_name: str, recipe: str) -> None:
    plan = sparse(plan_for(small, format_name, policy="all-linear", recipe=recipe))
    made = quantize(plan, tmp_path / "out", device="cpu")
    verdict = audit(tmp_path / "out")
    assert verdict.passed, [str(item) for item in verdict.findings]
    assert verdict.facts["sparsity"]["share"] == 1.0
    assert made["sparsity"]["zeros"] * 2 >= made["sparsity"]["weights"]


def test_a_dense_model_keeps_its_numbers_under_gptq(small: Path, tmp_path: Path) -> None:
    """Zeros are held only where they were asked for: those of a dense model may become numbers again."""
    done = calibrate(plan_for(small, "nvfp4", policy="all-linear", recipe="gptq"), device="cpu")
    weights = [module.weight for module in done.model.modules() if isinstance(module, nn.Linear)]
    assert any(sparsity.dense_groups(weight) for weight in weights)
    assert "sparsity" not in done.manifest


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "mixtral"])
def test_experts_are_sparse_however_they_are_stored(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    quantize(sparse(plan_for(tiny(kind), "nvfp4", policy="experts-only")), tmp_path / "out", device="cpu")
    verdict = audit(tmp_path / "out", against=tiny(kind))
    assert verdict.passed, [str(item) for item in verdict.findings]
    counted = verdict.facts["sparsity"]
    assert counted["share"] == 1.0 and counted["matrices"] >= 2 * 4 * 3


def test_matrices_that_saw_no_token_are_pruned_by_magnitude(tiny: Tiny) -> None:
    """A Hessian of zeros would prune the whole expert."""
    plan = with_calibration(plan_for(tiny("qwen3_moe"), "w4a16_nvfp4"), samples=1, length_tokens=1)
    done = calibrate(sparse(plan, "sparsegpt"), device="cpu")
    facts = done.manifest["sparsity"]
    # One token goes to 2 of 4 experts in each of 2 layers: three matrices of each of the others saw none.
    assert facts["by_magnitude"] == 2 * 2 * 3
    assert facts["zeros"] == facts["weights"] // 2


def test_sparsegpt_sees_what_sparse_layers_compute(tiny: Tiny) -> None:
    """The second layer is looked at behind the pruned first one: magnitude there changes what is chosen here."""
    plan = sparse(plan_for(tiny("llama"), "fp8"), "sparsegpt")
    done = calibrate(plan, device="cpu")
    layers: Any = done.model.model.layers
    for layer in layers:
        assert not sparsity.dense_groups(layer.self_attn.q_proj.weight)
    assert done.manifest["calibration"]["samples"] == 8
    assert done.manifest["sparsity"]["method"] == "sparsegpt"


def train(parameters: list[nn.Parameter], hold: Any, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    hold.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((parameter - 1.0).square().sum() for parameter in parameters).backward()  # type: ignore[union-attr]
        optimizer.step()


def test_zeros_are_held_in_training() -> None:
    dense = nn.Parameter(torch.randn(8, 16))
    weight = nn.Parameter(pruned(torch.randn(8, 16)))
    zeros, before = weight == 0, weight.detach().clone()
    train([weight, dense], hold_zeros({"weight": weight}))
    assert (weight[zeros] == 0).all()
    assert (weight != before)[~zeros].all()


def test_zeros_are_held_on_the_shards_of_a_process() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = nn.Parameter(distribute_tensor(pruned(torch.randn(8, 16)), mesh, [Shard(0)]))
        zeros, before = weight.full_tensor() == 0, weight.full_tensor().detach().clone()
        train([weight], hold_zeros([weight]))
        after = weight.full_tensor()
        assert (after[zeros] == 0).all()
        assert (after != before)[~zeros].all()
    finally:
        dist.destroy_process_group()
