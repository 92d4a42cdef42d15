"""Calibration of a mixture of experts: who sees a token, what is counted, what becomes of experts that see few."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import TEXT, plan_for, with_calibration
from tests.tiny import make_tiny
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Silent
from toolchain.modeling.experts import UnfusedExperts
from toolchain.modeling.loading import load_source
from toolchain.plan.types import Calibration
from toolchain.quantize.calibration import load_calibration
from toolchain.quantize.coverage import Coverage
from toolchain.quantize.forward import CalibrationPass
from toolchain.quantize.job import calibrate, quantize

CPU = torch.device("cpu")
MOE = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "minimax")
VARIANTS = ("gpt_oss", "llama4_text")
Tiny = Callable[[str], Path]
SMALL = Calibration(data=str(TEXT), samples=8, length_tokens=64)


def experts_of(model: Any) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, UnfusedExperts)}


def run_pass(model: Any, source: Path, settings: Calibration) -> CalibrationPass:
    data = load_calibration(settings, source)
    forward = CalibrationPass(model, data, settings=settings, device=CPU, progress=Silent())
    forward()
    return forward


def starving_model(directory: Path) -> Path:
    """Mixtral whose layer 0 never chooses experts 4 and 5: router rows (a, -a, b, -b, 0, 0), so two are above zero."""
    from safetensors.torch import load_file, save_file

    source = make_tiny("mixtral", directory, num_local_experts=6)
    tensors = load_file(source / "model.safetensors")
    gate = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    gate[1], gate[3], gate[4:] = -gate[0], -gate[2], 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize("kind", [*MOE, *VARIANTS])
@pytest.mark.parametrize(("mode", "ratio"), [("topk", 0.75), ("all", 1.0)])
def test_more_experts_see_tokens_and_no_hidden_state_changes(
    tiny: Tiny, kind: str, mode: str, ratio: float
) -> None:
    """Every hidden state is bit for bit that of the routed pass, and experts really ran on more tokens."""
    model: Any = load_source(tiny(kind), device=CPU)
    ran = {path: [0] * module.num_experts for path, module in experts_of(model).items()}

    def counter(path: str, index: int) -> Any:
        def count(module: Any, args: tuple[Any, ...]) -> None:
            ran[path][index] += len(args[0])

        return count

    for path, module in experts_of(model).items():
        for index, expert in enumerate(module):
            expert.register_forward_pre_hook(counter(path, index))
    hidden: dict[str, list[torch.Tensor]] = {"routed": [], mode: []}

    for name, states in hidden.items():
        settings = replace(SMALL, mode=name, topk_ratio=ratio if name == "topk" else 1.0)
        hooks = [
            layer.register_forward_hook(lambda module, args, out, states=states: states.append(
                out[0] if isinstance(out, tuple) else out))
            for layer in model.model.layers
        ]  # fmt: skip
        for counts in ran.values():
            counts[:] = [0] * len(counts)
        forward = run_pass(model, tiny(kind), settings)
        for hook in hooks:
            hook.remove()
    assert len(hidden["routed"]) == len(hidden[mode]) > 0
    for before, after in zip(hidden["routed"], hidden[mode], strict=True):
        assert torch.equal(before, after)
    tokens = SMALL.samples * SMALL.length_tokens
    for path, counts in ran.items():
        expected = {"all": [tokens] * 4, "topk": None}[mode]
        assert counts == expected or (expected is None and sum(counts) == tokens * 3)
        seen = forward.coverage.tokens(path) + forward.widening.extra[path]
        assert counts == seen.tolist()


@pytest.mark.parametrize("kind", MOE)
def test_topk_widens_as_the_models_own_router_would_with_a_larger_top_k(tiny: Tiny, kind: str) -> None:
    """Independent source: transformers' router of the first MoE layer, its top_k raised, on the same tokens."""
    model: Any = load_source(tiny(kind), device=CPU)
    settings = replace(SMALL, mode="topk", topk_ratio=0.75)
    forward = run_pass(model, tiny(kind), settings)
    path = next(iter(experts_of(model)))
    plain: Any = load_source(tiny(kind), device=CPU)
    router = plain.get_submodule(path.rpartition(".")[0]).gate
    router.top_k = 3
    chosen: list[torch.Tensor] = []
    router.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    with torch.no_grad():
        for batch in load_calibration(settings, tiny(kind)).batches(8):
            plain.base_model(input_ids=batch, use_cache=False)
    expected = torch.bincount(torch.cat(chosen).flatten(), minlength=4)
    seen = forward.coverage.tokens(path) + forward.widening.extra[path]
    # bf16 logits of two experts may tie; the other order is as good.
    assert (seen - expected).abs().sum() <= 0.02 * expected.sum()


def test_coverage_counts_tokens_and_samples_per_expert(tiny: Tiny) -> None:
    """By the definition, from what transformers' fused model chooses, one sample at a time."""
    import transformers

    settings = replace(SMALL, samples=5, batch_size=2)
    model = load_source(tiny("qwen3_moe"), device=CPU)
    coverage = run_pass(model, tiny("qwen3_moe"), settings).coverage
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tiny("qwen3_moe"), dtype="auto", experts_implementation="eager"
    ).eval()
    chosen: list[torch.Tensor] = []
    for layer in plain.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    tokens, samples = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
    for row in load_calibration(settings, tiny("qwen3_moe")).tokens:
        chosen.clear()
        with torch.no_grad():
            plain(input_ids=row[None])
        for layer, indices in enumerate(chosen):
            counts = torch.bincount(indices.flatten(), minlength=4)
            tokens[layer] += counts
            samples[layer] += counts > 0
    for layer, path in enumerate(coverage.experts):
        # Batches of other sizes may round a router's logits differently.
        assert (coverage.tokens(path) - tokens[layer]).abs().max() <= 2
        assert coverage.samples(path).tolist() == samples[layer].tolist()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
def test_the_sum_of_tokens_is_top_k_per_token(tiny: Tiny, kind: str) -> None:
    coverage = run_pass(load_source(tiny(kind), device=CPU), tiny(kind), SMALL).coverage
    top_k = 1 if kind == "llama4_text" else 2
    for path in coverage.experts:
        assert int(coverage.tokens(path).sum()) == 8 * 64 * top_k
        assert coverage.by_sample(path).sum(1).tolist() == [64 * top_k] * 8


def test_coverage_json_and_the_manifest_tell_the_same(tmp_path: Path) -> None:
    source = starving_model(tmp_path / "model")
    plan = with_calibration(plan_for(source, "nvfp4"), min_tokens_per_expert=3, max_samples=10)
    manifest = quantize(plan, tmp_path / "out", device="cpu")
    report = json.loads((tmp_path / "out" / "coverage.json").read_text())
    layer = report["layers"]["model.layers.0.mlp.experts"]
    assert layer["starved"] == [4, 5] and layer["min"] == 0 and layer["samples"][4] == 0
    assert layer["mean"] == sum(layer["tokens"]) / 6 and layer["max"] == max(layer["tokens"])
    assert report["samples"] == 10 == manifest["calibration"]["samples"]  # drawn to the end of the budget
    assert manifest["coverage"]["starved"] == report["starved"] == len(manifest["starved_experts"])
    assert "largest input range" in manifest["starved_remedy"] == report["remedy"]
    assert "coverage.json" in manifest["files"]


@pytest.mark.parametrize("format_name", ["fp8", "nvfp4"])
def test_a_starved_expert_takes_the_largest_input_scale_of_its_peers(
    tmp_path: Path, format_name: str
) -> None:
    """The remedy that the manifest names, checked on the bytes: raw inputs of the layer give the scale."""
    from safetensors.torch import load_file

    source = starving_model(tmp_path / "model")
    plan = plan_for(source, format_name)
    quantize(plan, tmp_path / "out", device="cpu")
    model: Any = load_source(source, device=CPU)
    largest = [0.0]
    model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, args: largest.append(float(args[0].abs().max()))
    )
    with torch.no_grad():
        for batch in load_calibration(plan.calibration, source).batches(8):
            model.base_model(input_ids=batch, use_cache=False)
    written = load_file(next((tmp_path / "out").glob("*.safetensors")))
    prefix = "model.layers.0.block_sparse_moe.experts"
    per_unit = 448.0 if format_name == "fp8" else 448.0 * 6
    for expert in range(6):
        for name in ("w1", "w3"):
            scale = float(written[f"{prefix}.{expert}.{name}.input_scale"])
            assert scale == pytest.approx(max(largest) / per_unit, rel=1e-6)
        assert float(written[f"{prefix}.{expert}.w2.input_scale"]) > 0


@pytest.mark.parametrize("kind", MOE)
def test_all_experts_of_every_family_have_equal_positive_input_scales(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    quantize(plan_for(tiny(kind), "nvfp4"), tmp_path / "out", device="cpu")
    reader = CheckpointReader(tmp_path / "out")
    groups: dict[str, set[float]] = {}
    for name in reader.infos:
        if ".experts." in name and name.endswith("input_scale"):
            layer, _, rest = name.partition(".experts.")
            groups.setdefault(layer + rest.partition(".")[2], set()).add(float(reader.get(name)))
    assert groups and all(len(values) == 1 and min(values) > 0 for values in groups.values())


def test_all_experts_mode_gives_a_starved_expert_inputs_of_its_own(tmp_path: Path) -> None:
    """AWQ of an expert without tokens finds no scale; with all experts it does, and the manifest says on what."""
    source = starving_model(tmp_path / "model")
    routed = calibrate(plan_for(source, "int4_awq"), device="cpu")
    every = calibrate(with_calibration(plan_for(source, "int4_awq"), mode="all"), device="cpu")
    module = "model.layers.0.mlp.experts.4.gate_proj"
    assert module not in routed.manifest["awq_alpha"] and module in every.manifest["awq_alpha"]
    assert every.coverage is not None
    layer = every.coverage["layers"]["model.layers.0.mlp.experts"]
    assert layer["tokens"][4] == 0 and layer["seen"] == [8 * 128] * 6
    assert "sends elsewhere" in every.manifest["starved_remedy"]


def test_strict_fails_before_anything_is_written_and_names_the_experts(tmp_path: Path) -> None:
    source = starving_model(tmp_path / "model")
    plan = with_calibration(plan_for(source, "nvfp4"), strict=True)
    with pytest.raises(
        ToolchainError, match=r"2 of 12 experts.*expert 4 of model\.layers\.0\.mlp\.experts"
    ) as caught:
        quantize(plan, tmp_path / "out", device="cpu")
    assert caught.value.code == "TC-221"
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_tf32_is_off_unless_asked_recorded_and_set_back(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain.quantize import job

    def switches() -> tuple[Any, ...]:
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cuda.allow_tf32, cudnn.allow_tf32, cuda.fp32_precision

    seen: list[tuple[Any, ...]] = []
    real = job.CalibrationPass.__call__

    def watching(self: CalibrationPass, model: Any = None) -> None:
        seen.append(switches())
        real(self, model)

    monkeypatch.setattr(job.CalibrationPass, "__call__", watching)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = switches()
    plan = plan_for(tiny("llama"), "fp8")
    assert calibrate(plan, device="cpu").manifest["tf32"] is False
    assert switches() == before
    assert calibrate(with_calibration(plan, allow_tf32=True), device="cpu").manifest["tf32"] is True
    assert switches() == before
    with pytest.raises(UsageError):
        calibrate(with_calibration(plan, data="./absent.txt"), device="cpu")
    assert switches() == before
    assert seen == [("highest", False, False, "ieee"), ("high", True, True, "tf32")]


def test_coverage_of_a_subset_is_that_of_its_samples(tiny: Tiny) -> None:
    model = load_source(tiny("mixtral"), device=CPU)
    coverage: Coverage = run_pass(model, tiny("mixtral"), SMALL).coverage
    path = next(iter(coverage.experts))
    part = coverage.of([1, 6])
    assert torch.equal(part.by_sample(path), coverage.by_sample(path)[[1, 6]])
    assert part.drawn == 2 and coverage.drawn == 8
