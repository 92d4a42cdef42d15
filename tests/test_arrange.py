"""Recipe ``arrange``: channels of gated MLPs in another order and scale, which changes nothing but how they round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from tests.tiny import KINDS
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.codecs import e2m1
from toolchain.core.errors import UsageError
from toolchain.modeling.loading import load_source
from toolchain.models.reader import read_model
from toolchain.plan.planner import make_plan
from toolchain.plan.types import Calibration
from toolchain.quantize.accuracy import arrange, arrange_search
from toolchain.quantize.job import quantize

CPU = torch.device("cpu")
Tiny = Callable[[str], Path]


def random_arrangement(channels: int, generator: torch.Generator) -> arrange_search.Arrangement:
    powers = torch.randint(-4, 5, (channels,), generator=generator).float().exp2()
    return arrange_search.Arrangement(order=torch.randperm(channels, generator=generator), powers=powers)


@pytest.mark.parametrize("kind", KINDS)
def test_no_family_computes_anything_else(tiny: Tiny, kind: str) -> None:
    """transformers' own logits, whatever order and powers the channels have; families with biases are left alone."""
    model: Any = load_source(tiny(kind), device=CPU, dtype=torch.float32)
    tokens = torch.randint(4, 260, (2, 40), generator=torch.Generator().manual_seed(0))
    linears = {path: "nvfp4" for path, item in model.named_modules() if isinstance(item, torch.nn.Linear)}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        mlps = arrange.gated_mlps(linears, model, {"nvfp4"})
        for path in mlps:
            mlp = model.get_submodule(path)
            arrange.apply(mlp, random_arrangement(mlp.down_proj.in_features, generator))
        after = model(input_ids=tokens).logits
    assert bool(mlps) == (kind != "gpt_oss")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def heavy(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [count, 64] whose channels are of many magnitudes, as behind a SwiGLU, and a weight [32, 64]."""
    size = torch.linspace(-2, 2, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(5))].exp2()
    inputs = torch.randn(count, 64, generator=generator) * torch.randn(count, 64, generator=generator) * size
    return inputs, torch.randn(32, 64, generator=torch.Generator().manual_seed(6)) / size.sqrt()


def task_of(
    inputs: torch.Tensor, weight: torch.Tensor, rounding: arrange_search.Rounding, *, lowest: float
) -> arrange_search.Task:
    return arrange_search.Task(
        path="mlp",
        inputs=inputs,
        judging=inputs,
        weight=weight,
        rounding=rounding,
        lowest=torch.full((64,), lowest),
        highest=torch.full((64,), 2.0),
    )


def modelopt_rounded(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """[n, K] as ModelOpt packs and unpacks it, float32."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    scale_2 = amax / (6 * 448)
    scales = NVFP4QTensor.get_weights_scaling_factor(x, 16, scale_2)[0]
    packed = NVFP4QTensor.quantize(x, 16, scales, scale_2)[0]
    return packed.dequantize(dtype=torch.float32, scale=scales, double_scale=scale_2, block_sizes={-1: 16})


@pytest.mark.parametrize("rounds_inputs", [True, False])
def test_the_output_error_falls_on_tokens_that_it_has_not_seen(rounds_inputs: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = heavy(512, generator)
    others, _ = heavy(512, generator)
    amax, weight_amax = torch.cat([inputs, others]).abs().amax(), weight.abs().amax()
    rounding = arrange_search.Rounding(
        inputs=e2m1.global_scale(amax) if rounds_inputs else None, weight=e2m1.global_scale(weight_amax)
    )
    task = task_of(inputs, weight, rounding, lowest=0.0)
    # A smaller one beside it changes nothing but the dice.
    found, _ = arrange_search.search([task, task_of(inputs[:40], weight, rounding, lowest=0.0)], seed=0)
    assert sorted(found.order.tolist()) == list(range(64))
    assert set(found.powers.tolist()) <= {1.0, 2.0, 4.0}

    def error(x: torch.Tensor, w: torch.Tensor) -> float:
        rounded = modelopt_rounded(x, amax) if rounds_inputs else x
        return float((rounded @ modelopt_rounded(w, weight_amax).T - others @ weight.T).square().sum())

    assert error(*arrange_search.rearranged(others, weight, found)) < 0.85 * error(others, weight)


def test_what_the_search_lowers_is_the_sum_that_it_says() -> None:
    """The state that is kept move by move equals the error of what came out, computed anew."""
    inputs, weight = heavy(64, torch.Generator().manual_seed(0))
    rounding = arrange_search.Rounding(
        inputs=e2m1.global_scale(inputs.abs().amax()), weight=e2m1.global_scale(weight.abs().amax())
    )
    few = inputs[:20]
    state = arrange_search._State([task_of(rows, weight, rounding, lowest=-2.0) for rows in (inputs, few)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        state.exchange(generator)
        state.scale(generator)
    for rows, found, errors in zip((inputs, few), state.found(), state.errors.chunk(2), strict=True):
        again = arrange_search.output_error(*arrange_search.rearranged(rows, weight, found), rounding)
        torch.testing.assert_close(errors.sum(), again, rtol=1e-4, atol=0)
        assert sorted(found.order.tolist()) == list(range(64))
    assert state.exponents.abs().max() <= 2 and (state.exponents != 0).any()


def test_a_sample_is_uniform_over_all_batches_and_knows_the_range_of_all() -> None:
    sample = arrange.Sample(seed=0)
    values = torch.arange(20 * 512.0)
    for batch in values.split(512):
        sample.add(batch.unsqueeze(-1).repeat(1, 16))
    rows = sample.rows()
    assert rows is not None and rows.shape == (arrange.SAMPLE_TOKENS, 16)
    assert len(rows[:, 0].unique()) == arrange.SAMPLE_TOKENS
    assert abs(rows.mean() / values.mean() - 1) < 0.05
    assert sample.peaks is not None and sample.peaks.max() == values.max()


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "llama4_text", "llama"])
@pytest.mark.parametrize("format_name", ["nvfp4", "w4a16_nvfp4"])
def test_only_rounding_changes_and_the_audit_finds_the_order_in_the_bytes(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str
) -> None:
    """Same calibrated ranges as without; nothing is stored that would say the order."""
    source = tiny(kind)
    made = {
        recipe: quantize(
            plan_for(source, format_name, policy="all-linear", recipe=recipe), tmp_path / recipe, device="cpu"
        )
        for recipe in ("arrange", "max")
    }
    left = made["arrange"]["arranged"]
    assert left and all(0 < layer["error_left"] < 1 for layer in left.values())
    ours, without = (CheckpointReader(tmp_path / recipe) for recipe in made)
    ranges = [name for name in without.infos if name.endswith(("input_scale", "weight_scale_2"))]
    assert ranges and all(torch.equal(ours.get(name), without.get(name)) for name in ranges)
    assert any(not torch.equal(ours.get(name), without.get(name)) for name in without.infos)
    verdict = audit(tmp_path / "arrange", against=source)
    assert verdict.passed, [str(finding) for finding in verdict.findings]


def test_a_matrix_in_the_wrong_order_is_found(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny("qwen3_moe")
    quantize(plan_for(source, "nvfp4", recipe="arrange"), tmp_path / "out", device="cpu")
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.1.down_proj"
    for suffix in ("weight", "weight_scale"):
        tensors[f"{name}.{suffix}"] = tensors[f"{name}.{suffix}"].roll(1, dims=1)
    save_file(tensors, file, {"format": "pt"})
    verdict = audit(tmp_path / "out", against=source)
    assert any(item.code == "TC-348" and item.where == name for item in verdict.findings)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_2"])
def test_a_doubled_matrix_without_its_half_is_found(tiny: Tiny, tmp_path: Path, suffix: str) -> None:
    """Also where nobody knows how the checkpoint was made."""
    from safetensors.torch import load_file, save_file

    source = tiny("llama")
    quantize(
        plan_for(source, "w4a16_nvfp4", policy="all-linear", recipe="max"), tmp_path / "out", device="cpu"
    )
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    tensors[name] = (tensors[name].float() / 2).to(tensors[name].dtype)
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "out" / "quantize.json").unlink()
    verdict = audit(tmp_path / "out", against=source)
    assert any(item.code == "TC-348" and "layers.0.mlp" in item.where for item in verdict.findings)


def test_matrices_that_are_not_all_quantized_alike_stay_where_they_are(tiny: Tiny) -> None:
    model: Any = load_source(tiny("llama"), device=CPU)
    down = "model.layers.0.mlp.down_proj"
    assert arrange.gated_mlps({down: "nvfp4"}, model, {"nvfp4"}) == []
    mixed = {down: "nvfp4", down.replace("down", "gate"): "fp8", down.replace("down", "up"): "nvfp4"}
    assert arrange.gated_mlps(mixed, model, {"nvfp4"}) == []


def test_it_goes_with_neither_zeros_nor_a_search_of_formats(tiny: Tiny) -> None:
    from toolchain.auto.candidates import Auto
    from toolchain.auto.space import find_space
    from toolchain.plan.sparsity import sparsity_of

    info, calibration = read_model(str(tiny("llama"))), Calibration(data="")
    plan = make_plan(
        info, format="nvfp4", recipe="arrange", calibration=calibration, sparsity=sparsity_of("2:4", "magnitude"),
        target="tensorrt",
    )  # fmt: skip
    assert any(item.code == "TC-265" and "arrange" in item.message for item in plan.findings)
    with pytest.raises(UsageError, match="arrange") as refused:
        find_space(info, Auto(bits=5.0, formats=("nvfp4", "fp8")), recipe="arrange", calibration=calibration)
    assert refused.value.code == "TC-170"
