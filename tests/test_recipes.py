"""Recipes: each search against its definition, computed from raw weights and inputs with ModelOpt's own rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.codecs import e2m1
from toolchain.core.errors import UsageError
from toolchain.formats import FORMATS, get_format
from toolchain.modeling.loading import load_checkpoint, load_source
from toolchain.quantize.accuracy import compensate, gptq, smoothquant
from toolchain.quantize.accuracy.grids import WINDOW, Int4Grid, Mxfp4Grid, Nvfp4Grid
from toolchain.quantize.accuracy.scale_search import block_hessian, choose_scales
from toolchain.quantize.accuracy.statistics import InputStatistics
from toolchain.quantize.job import calibrate, quantize
from toolchain.recipes import BEST, INGREDIENTS, get_recipe

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
Tiny = Callable[[str], Path]


def modelopt_nvfp4(weight: torch.Tensor, scales: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """[N, K] as ModelOpt packs and unpacks it under the given scales, float32."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed = NVFP4QTensor.quantize(weight, 16, scales, scale_2)[0]
    return packed.dequantize(dtype=torch.float32, scale=scales, double_scale=scale_2, block_sizes={-1: 16})


def weights(kind: str, generator: torch.Generator) -> torch.Tensor:
    gaussian = torch.randn(24, 128, generator=generator)
    if kind == "heavy tails":
        return gaussian / torch.randn(24, 128, generator=generator).abs().clamp(min=0.05)
    if kind == "many magnitudes":
        return gaussian * torch.logspace(-6, 2, 24)[:, None]
    return gaussian


@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "many magnitudes"])
def test_mse_is_the_best_of_all_126_scales(kind: str) -> None:
    weight = weights(kind, torch.Generator().manual_seed(0))
    grid = Nvfp4Grid(e2m1.global_scale(weight.abs().amax()))

    def errors(scales: torch.Tensor) -> torch.Tensor:
        return (
            (modelopt_nvfp4(weight, scales, grid.scale_2) - weight).unflatten(-1, (-1, 16)).square().sum(-1)
        )

    everything = torch.stack(
        [
            errors(torch.full((24, 8), code, dtype=torch.uint8).view(torch.float8_e4m3fn))
            for code in range(1, 127)
        ]
    )
    best = everything.amin(0)
    chosen = errors(choose_scales(weight, grid, "mse"))
    torch.testing.assert_close(chosen, best, rtol=1e-5, atol=0)
    window = errors(choose_scales(weight, grid, "window"))
    assert (window >= best * (1 - 1e-5)).all() and window.sum() < 1.05 * best.sum()
    assert window.sum() < 0.9 * errors(grid.base(weight)).sum()


def test_four_over_six_takes_the_better_of_two_maxima_in_each_block() -> None:
    weight = weights("gaussian", torch.Generator().manual_seed(1))
    grid = Nvfp4Grid(e2m1.global_scale(weight.abs().amax() * 2))
    chosen = choose_scales(weight, grid, "four_over_six").float()
    amax = weight.unflatten(-1, (-1, 16)).abs().amax(-1)
    six = (amax / 6 / grid.scale_2).to(torch.float8_e4m3fn)
    four = (six.float() * 1.5).to(torch.float8_e4m3fn)

    def errors(scales: torch.Tensor) -> torch.Tensor:
        return (
            (modelopt_nvfp4(weight, scales, grid.scale_2) - weight).unflatten(-1, (-1, 16)).square().sum(-1)
        )

    expected = torch.where(errors(four) < errors(six), four.float(), six.float())
    assert torch.equal(chosen, expected)
    assert 0.1 < float((chosen == four.float()).float().mean()) < 0.9


def test_local_hessian_minimises_what_each_block_does_to_the_output() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = weights("heavy tails", generator)
    inputs = torch.randn(300, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    grid = Nvfp4Grid(e2m1.global_scale(weight.abs().amax()))
    chosen = choose_scales(weight, grid, "local_hessian", block_hessian(inputs.T @ inputs, 16))

    def output_errors(scales: torch.Tensor) -> torch.Tensor:
        difference = (modelopt_nvfp4(weight, scales, grid.scale_2) - weight).unflatten(-1, (-1, 16))
        return torch.einsum("tbk,nbk->nbt", inputs.unflatten(-1, (-1, 16)), difference).square().sum(-1)

    codes = grid.base(weight).view(torch.uint8).int()
    candidates = [
        (codes + offset).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn) for offset in WINDOW
    ]
    best = torch.stack([output_errors(scales) for scales in candidates]).amin(0)
    mine = output_errors(chosen)
    assert (mine <= best * 1.001).all()
    assert mine.sum() < output_errors(choose_scales(weight, grid, "mse")).sum()


@pytest.mark.parametrize("kind", ["nvfp4", "int4", "mxfp4"])
def test_gptq_is_the_textbook_algorithm(kind: str) -> None:
    """Against the optimal brain surgeon step in float64, one column after the other, without factorisations."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(32, 256, generator=generator)
    inputs = torch.randn(700, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    grid: Any = {
        "nvfp4": Nvfp4Grid(e2m1.global_scale(weight.abs().amax())),
        "int4": Int4Grid(),
        "mxfp4": Mxfp4Grid(),
    }[kind]
    factors = grid.factors(grid.base(weight)).repeat_interleave(grid.group, dim=-1)
    gram = inputs.T @ inputs / len(inputs)
    solved = gptq.solve(weight, factors, gram, grid.round)

    hessian = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(256)
    order = hessian.diagonal().argsort(descending=True)
    inverse, rest = hessian.inverse()[order][:, order], weight.double()[:, order]
    steps, expected = factors[:, order].double(), torch.empty(32, 256, dtype=torch.double)
    for column in range(256):
        value = grid.round((rest[:, column] / steps[:, column]).float()).double() * steps[:, column]
        expected[:, column] = value
        error = (rest[:, column] - value) / inverse[column, column]
        rest = rest - error[:, None] * inverse[column]
        inverse = (
            inverse - inverse[:, column : column + 1] @ inverse[column : column + 1] / inverse[column, column]
        )
    expected = expected[:, order.argsort()].float()
    # A value that lies between two codes may fall either way in float32, and what follows makes up for it.
    assert float((solved != expected).float().mean()) < 0.02

    def loss(values: torch.Tensor) -> float:
        return float((inputs @ (values - weight).T).square().sum())

    assert loss(solved) == pytest.approx(loss(expected), rel=0.02)
    assert loss(solved) < 0.5 * loss(grid.round(weight / factors) * factors)


def test_compensation_lowers_the_error_on_rounded_inputs_that_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(128, 128, generator=generator) * torch.logspace(0, -2, 128)
    inputs = torch.randn(4000, 128, generator=generator) @ mixing.T
    weight = torch.randn(64, 128, generator=generator)
    scale = e2m1.global_scale(inputs.abs().amax())
    statistics = InputStatistics()
    for part in inputs[:3000].split(500):
        statistics.add(part, e2m1.fake_quantize(part, scale))
    solved = compensate.compensated(weight, statistics)
    fresh = inputs[3000:]
    rounded = e2m1.fake_quantize(fresh, scale)

    def loss(values: torch.Tensor) -> float:
        return float((rounded @ values.T - fresh @ weight.T).square().mean())

    assert loss(solved) < 0.9 * loss(weight)
    few = InputStatistics()
    for part in inputs[:160].split(40):
        few.add(part, e2m1.fake_quantize(part, scale))
    assert loss(compensate.compensated(weight, few)) < 1.01 * loss(weight)
    one = InputStatistics()
    one.add(inputs[:1], e2m1.fake_quantize(inputs[:1], scale))
    assert torch.equal(compensate.compensated(weight, one), weight)


def test_smoothquant_finds_an_alpha_that_beats_the_usual_one() -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(400, 128, generator=generator) * torch.where(torch.arange(128) % 16 == 0, 30.0, 1.0)
    weight = torch.randn(64, 128, generator=generator)
    statistics = InputStatistics()
    statistics.add(inputs)
    scale, alpha = smoothquant.search([weight], statistics)

    def loss(factor: torch.Tensor) -> float:
        scaled, x = weight * factor, inputs / factor
        steps = scaled.abs().amax(-1, keepdim=True) / 127
        step = x.abs().amax() / 127
        output = ((x / step).round() * step) @ ((scaled / steps).round() * steps).T
        return float((output - inputs @ weight.T).square().mean())

    usual = (inputs.abs().amax(0) / weight.abs().amax(0)).sqrt()
    assert loss(scale) <= 1.02 * loss(usual)
    assert loss(scale) < 0.3 * loss(torch.ones(128))
    assert 0 < alpha <= 1


def test_headroom_gives_the_input_scales_of_modelopts_own_algorithm(tiny: Tiny) -> None:
    import modelopt.torch.quantization as mtq

    plan = plan_for(tiny("llama"), "nvfp4", policy="all-linear", recipe="headroom")
    ours: Any = calibrate(plan, device="cpu").model
    from toolchain.quantize.backend import adapt
    from toolchain.quantize.calibration import load_calibration

    theirs: Any = load_source(tiny("llama"), device=CPU)
    config = mtq.NVFP4_DEFAULT_CFG
    config = config if isinstance(config, dict) else config.model_dump(exclude_unset=True)
    entries = [
        {**item, "cfg": adapt(item["cfg"])} if item.get("cfg") else item for item in config["quant_cfg"]
    ]
    tokens = load_calibration(plan.calibration, tiny("llama")).tokens
    with torch.no_grad():
        mtq.quantize(
            theirs, {"quant_cfg": entries, "algorithm": "nvfp4_act_headroom"}, lambda model: model(tokens)
        )
    for name in ("o_proj", "q_proj"):
        path = f"model.layers.1.self_attn.{name}"
        mine, other = (model.get_submodule(path).input_quantizer.amax.float() for model in (ours, theirs))
        torch.testing.assert_close(mine.reshape(()), other.reshape(()), rtol=0.02, atol=0)
    plain: Any = calibrate(plan_for(tiny("llama"), "nvfp4", policy="all-linear"), device="cpu").model
    path = "model.layers.1.self_attn.o_proj"
    assert ours.get_submodule(path).input_quantizer.amax > 2 * plain.get_submodule(path).input_quantizer.amax


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "minimax", "gpt_oss", "llama4_text", "llama"]
)
def test_the_walk_computes_what_the_model_computes(tiny: Tiny, kind: str) -> None:
    """Layer by layer from stored inputs = transformers' own hidden states, whatever a layer takes as arguments."""
    from toolchain.quantize.accuracy.layers import Arguments, HeldHidden, LayerWalk, enter

    model: Any = load_source(tiny(kind), device=CPU, dtype=torch.float32)
    tokens = torch.randint(4, 260, (3, 80), generator=torch.Generator().manual_seed(0))
    batches = list(tokens.split(2))
    seen: list[list[torch.Tensor]] = []
    arguments: Arguments = {}
    walk = LayerWalk(model, HeldHidden(enter(model, batch, arguments) for batch in batches), arguments)
    for layer in walk:
        outputs: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda m, a, output, found=outputs: found.append(output))
        walk.run()  # once to observe
        hook.remove()
        seen.append([item[0] if isinstance(item, tuple) else item for item in outputs])
    hooked: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.get_submodule(walk.prefix)):
        layer.register_forward_hook(lambda m, a, output, index=index: hooked.__setitem__(index, output))
    for number, batch in enumerate(batches):
        with torch.no_grad():
            model(input_ids=batch, use_cache=False)
        for index, outputs in enumerate(seen):
            expected = hooked[index][0] if isinstance(hooked[index], tuple) else hooked[index]
            torch.testing.assert_close(outputs[number], expected)


def held_out(source: Path) -> torch.Tensor:
    """[8, 128] tokens of text like the calibration's, from files that it does not read."""
    from toolchain.data.tokenizer import load_tokenizer

    text = Path(compensate.__file__).with_name("weights.py").read_text(encoding="utf-8")
    return torch.tensor(load_tokenizer(source)(text).input_ids[:1024]).view(8, 128)


RECIPES = {
    "nvfp4": ("arrange", "mse", "four_over_six", "arrange+compensate+local_hessian+gptq"),
    "w4a16_nvfp4": ("window", "arrange+local_hessian+gptq"),
    "w4a8_nvfp4_fp8": ("mse+gptq",),
    "mxfp4": ("mse", "local_hessian+gptq"),
    "int4_awq": ("max", "awq+clip", "awq+clip+gptq"),
    "int4_gptq": ("gptq", "clip+gptq"),
    "w4a8_awq": ("awq+clip+gptq",),
    "int8_sq": ("smoothquant", "smoothquant+gptq"),
    "int8_wo": ("gptq",),
    "fp8": ("compensate+gptq",),
    "fp8_block": ("compensate+gptq",),
    "fp8_per_channel_per_token": ("gptq",),
    "mxfp8": ("compensate+gptq",),
}


@pytest.mark.parametrize(
    ("format_name", "recipe"), [(name, item) for name in RECIPES for item in RECIPES[name]]
)
@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_a_recipe_changes_the_numbers_and_nothing_else(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str, recipe: str
) -> None:
    """Same layout, same size, no finding; closer to the source than without; the model in memory is what ships."""
    source, output = tiny(kind), tmp_path / "out"
    plan = plan_for(source, format_name, policy="all-linear", recipe=recipe)
    done = calibrate(plan, device="cpu")
    from toolchain.core.progress import Silent

    output.mkdir()
    done.exporter.write(output, Silent())
    verdict = audit(output, against=source)
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    plain = tmp_path / "plain"
    quantize(plan_for(source, format_name, policy="all-linear", recipe="max"), plain, device="cpu")
    tokens = held_out(source)
    with torch.no_grad():
        reference = load_source(source, device=CPU)(tokens).logits.float()
        ours = load_checkpoint(output, device=CPU)(tokens).logits.float()
        memory = done.model(tokens).logits.float()
        without = load_checkpoint(plain, device=CPU)(tokens).logits.float()
    error = (ours - reference).norm()
    assert (ours - memory).norm() < 0.1 * error
    if "gptq" in recipe:
        assert error < (without - reference).norm()


def test_the_same_recipe_gives_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    plan = plan_for(tiny("qwen3_moe"), "nvfp4", recipe="compensate+local_hessian+gptq")
    first, second = (quantize(plan, tmp_path / name, device="cpu") for name in "ab")
    assert first["files"] == second["files"]
    assert first["recipe"] == "compensate+local_hessian+gptq"


def test_experts_without_tokens_fall_back_to_what_weights_can_tell(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tests.tiny import make_tiny

    source = make_tiny("mixtral", tmp_path / "model", num_local_experts=6)
    tensors = load_file(source / "model.safetensors")
    gate = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    gate[1], gate[3], gate[4:] = -gate[0], -gate[2], 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = plan_for(source, "nvfp4", policy="experts-only", recipe="local_hessian+gptq")
    quantize(plan, tmp_path / "out", device="cpu")
    assert audit(tmp_path / "out", against=source).passed
    name = "model.layers.0.block_sparse_moe.experts.5.w1"
    stored, weight = CheckpointReader(tmp_path / "out"), tensors[f"{name}.weight"].float()
    scale_2 = stored.get(f"{name}.weight_scale_2")
    expected = choose_scales(weight, Nvfp4Grid(scale_2), "window")
    assert torch.equal(stored.get(f"{name}.weight_scale").float(), expected.float())


def test_recipes_are_names_joined_by_plus() -> None:
    nvfp4, awq = get_format("nvfp4"), get_format("int4_awq")
    assert get_recipe("gptq+mse", nvfp4).name == "mse+gptq"
    assert get_recipe(None, nvfp4).name == get_recipe("max", nvfp4).name == "max"
    assert get_recipe("default", awq).name == "awq"
    for bad, said in {
        "nonsense": "nonsense",
        "mse+window": "both decide the scales",
        "awq": "does not apply to nvfp4",
        "": "",
    }.items():
        if bad:
            with pytest.raises(UsageError, match=said):
                get_recipe(bad, nvfp4)
    known = {item.name for item in FORMATS}
    assert all(set(item.formats) <= known for item in INGREDIENTS)
    for found in FORMATS:
        assert get_recipe("best", found).name and get_recipe("default", found).name


@pytest.mark.parametrize("format_name", sorted(BEST))
def test_best_is_what_was_measured(format_name: str) -> None:
    """Each entry beats the format's default on three models of different families, beyond the noise of windows."""
    record = json.loads((ROOT / "benchmarks" / "results" / "accuracy.json").read_text())
    method = f"ours-{format_name}-{BEST[format_name].replace('+', '_')}-all"
    rows = [row for row in record["rows"] if row["method"] == method]
    assert len({row["model"] for row in rows}) >= 3
    for row in rows:
        assert row["judged"] == ["exported bytes"] and row["ratios"]["our default"]["high"] < 1, row["model"]
