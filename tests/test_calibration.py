"""Calibration of a mixture of experts: who sees a token, what is counted, which samples are drawn, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import TEXT, plan_for
from tests.tiny import make_tiny
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Silent
from toolchain.modeling.experts import UnfusedExperts
from toolchain.modeling.loading import load_source
from toolchain.models.reader import read_model
from toolchain.plan.planner import PlanRefused, make_plan, require_clean
from toolchain.plan.types import Calibration, Plan
from toolchain.quantize.calibration import load_calibration
from toolchain.quantize.coverage import Coverage
from toolchain.quantize.forward import CalibrationPass
from toolchain.quantize.job import calibrate, quantize
from toolchain.quantize.sampling import choose_balanced, shortest_prefix

CPU = torch.device("cpu")
MOE = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "minimax")
VARIANTS = ("gpt_oss", "llama4_text")
Tiny = Callable[[str], Path]
SMALL = Calibration(data=str(TEXT), samples=8, length_tokens=64)


def with_calibration(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, calibration=replace(plan.calibration, **changes))


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


def test_samples_are_drawn_until_every_expert_has_enough(tiny: Tiny) -> None:
    """As few as needed, counted again by hand from the coverage of the samples that were chosen."""
    source = tiny("qwen3_moe")
    plan = with_calibration(
        plan_for(source, "nvfp4"), samples=2, length_tokens=32, min_tokens_per_expert=60, max_samples=64
    )
    done = calibrate(plan, device="cpu")
    assert done.coverage is not None
    count = done.manifest["calibration"]["samples"]
    assert 2 < count < 64 and done.coverage["min"] >= 60 and not done.manifest["starved_experts"]
    fewer = with_calibration(plan, samples=count - 1, min_tokens_per_expert=0)
    short = calibrate(fewer, device="cpu")
    assert short.coverage is not None and short.coverage["min"] < 60
    assert done.manifest["calibration"]["pool"]["samples"] > count


@pytest.mark.parametrize("sampling", ["random", "balanced"])
@pytest.mark.parametrize("format_name", ["nvfp4", "int4_awq"])
def test_the_same_seed_gives_the_same_bytes_however_samples_are_chosen(
    tiny: Tiny, tmp_path: Path, sampling: str, format_name: str
) -> None:
    plan = with_calibration(
        plan_for(tiny("mixtral"), format_name),
        samples=4, length_tokens=32, sampling=sampling, min_tokens_per_expert=70, max_samples=32,
    )  # fmt: skip
    first = quantize(plan, tmp_path / "a", device="cpu")
    second = quantize(plan, tmp_path / "b", device="cpu")
    assert first["files"] == second["files"] and first["calibration"] == second["calibration"]
    assert first["calibration"]["chosen_sha256"]
    other = calibrate(with_calibration(plan, seed=1), device="cpu")
    assert other.manifest["calibration"]["tokens_sha256"] != first["calibration"]["tokens_sha256"]


def test_balanced_sampling_fills_the_least_used_expert(tiny: Tiny) -> None:
    """Text of two kinds: a rare one uses experts that the common one leaves alone, by construction of the counts."""
    common, rare = torch.tensor([[30, 34, 0, 0]]), torch.tensor([[20, 20, 12, 12]])
    counts = torch.cat([common.repeat(20, 1), rare.repeat(3, 1)])
    chosen = choose_balanced(counts, samples=4)
    assert {20, 21, 22} < set(chosen) and len(chosen) == 4
    assert choose_balanced(counts, samples=4) == chosen == sorted(chosen)
    # The first two experts reach 90; nothing is left that helps the others, so no more is drawn.
    assert choose_balanced(counts[:21], samples=1, minimum=90, limit=10) == [0, 1, 2, 20]
    assert choose_balanced(counts, samples=1, minimum=24, limit=10) == [20, 21]


def test_greedy_choice_is_the_greedy_choice() -> None:
    """The heap against the definition: scan everything in each step."""
    counts = torch.randint(0, 9, (40, 12), generator=torch.Generator().manual_seed(0))
    total, chosen = torch.zeros(12, dtype=torch.float64), []
    for _ in range(15):
        gains = (torch.log1p(total + counts.double()) - torch.log1p(total)).sum(1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        total += counts[chosen[-1]]
    assert choose_balanced(counts, samples=15) == sorted(chosen)


def test_shortest_prefix() -> None:
    counts = torch.tensor([[3, 1], [3, 0], [0, 2], [5, 5]])
    assert shortest_prefix(counts, 1, 3) == 3
    assert shortest_prefix(counts, 4, 3) == 4
    assert shortest_prefix(counts, 1, 0) == 1
    assert shortest_prefix(counts, 1, 100) == 4


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


BAD: list[tuple[dict[str, Any], str]] = [
    ({"mode": "topk", "topk_ratio": 0.0}, r"not in \(0, 1\]"),
    ({"mode": "topk", "topk_ratio": 1.5}, r"not in \(0, 1\]"),
    ({"mode": "topk", "topk_ratio": float("nan")}, r"not in \(0, 1\]"),
    ({"mode": "some"}, "unknown 'some'"),
    ({"sampling": "even"}, "unknown 'even'"),
    ({"mode": "all", "topk_ratio": 0.5}, "has no meaning"),
    ({"min_tokens_per_expert": -1}, "negative"),
    ({"min_tokens_per_expert": 1, "samples": 64, "max_samples": 32}, "less than the 64"),
    (
        {"min_tokens_per_expert": 65, "max_samples": 2, "samples": 2},
        "cannot be reached.*--calib-max-samples 3",
    ),
]


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_settings_that_mean_nothing_are_refused_by_the_plan(
    tiny: Tiny, changes: dict[str, Any], said: str
) -> None:
    """The last case: 65 tokens for each of 4 experts, 2 samples of 64 tokens with 2 experts each make 256 choices."""
    plan = make_plan(
        read_model(str(tiny("qwen3_moe"))), format="nvfp4", calibration=replace(SMALL, **changes)
    )
    with pytest.raises(PlanRefused):
        require_clean(plan)
    import re

    assert any(finding.code == "TC-160" and re.search(said, str(finding)) for finding in plan.findings)


def test_expert_options_on_a_dense_model_are_a_warning_and_change_nothing(tiny: Tiny) -> None:
    wanted = replace(SMALL, min_tokens_per_expert=5, sampling="balanced")
    plan = require_clean(make_plan(read_model(str(tiny("llama"))), format="fp8", calibration=wanted))
    assert [finding.code for finding in plan.findings if finding.code == "TC-161"]
    plain = calibrate(with_calibration(plan, min_tokens_per_expert=0, sampling="random"), device="cpu")
    asked = calibrate(plan, device="cpu")
    hashes = [done.manifest["calibration"]["tokens_sha256"] for done in (plain, asked)]
    assert hashes[0] == hashes[1] and asked.manifest["coverage"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--calibrate-topk-ratio", "0.5"], "give both"),
        (["--calibrate-experts", "topk"], "give both"),
        (["--calibrate-experts", "topk", "--calibrate-topk-ratio", "2"], "not in (0, 1]"),
        (["--min-tokens-per-expert", "-1"], "at least 0"),
        (["--min-tokens-per-expert", "999999999"], "cannot be reached"),
    ],
)
def test_the_command_line_refuses_contradictions(
    toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path, options: list[str], said: str
) -> None:
    given = ("quantize", tiny("qwen3_moe"), "--format", "nvfp4", "--calib-data", TEXT)
    ran = toolchain(*given, "--output", tmp_path / "out", *options)
    assert ran.status == 2 and said in ran.err and not (tmp_path / "out").exists()


def test_options_reach_the_plan_and_plans_survive_json(
    toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("a" * 500)
    ran = toolchain(
        "quantize", tiny("qwen3_moe"), "--format", "nvfp4", "--calib-data", TEXT, "--calib-data", tmp_path / "one.txt",
        "--calibrate-experts", "topk", "--calibrate-topk-ratio", 0.5, "--min-tokens-per-expert", 7, "--strict",
        "--calib-max-samples", 200, "--sampling", "balanced", "--allow-tf32", "--output", tmp_path / "out",
        "--dry-run", "--json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    plan = Plan.from_json(ran.json)
    found = plan.calibration
    assert found.sources == (str(TEXT), str(tmp_path / "one.txt"))
    assert (found.mode, found.topk_ratio, found.min_tokens_per_expert) == ("topk", 0.5, 7)
    assert (found.max_samples, found.sampling, found.strict, found.allow_tf32) == (
        200,
        "balanced",
        True,
        True,
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_several_sources_are_drawn_from_evenly_and_copies_are_dropped(tiny: Tiny, tmp_path: Path) -> None:
    """One byte is one token. The second file repeats a document of the first and is otherwise short of text."""
    documents = ["a" * 200, "b" * 200, "b" * 200 + "\n"]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (tmp_path / "short.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ["a" * 200, "z" * 100])
    )
    sources = (str(tmp_path / "long.jsonl"), str(tmp_path / "short.jsonl"))
    settings = Calibration(data=sources, samples=8, length_tokens=32)
    found = load_calibration(settings, tiny("llama"))
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    load_calibration(settings, tiny("llama"), Notes())
    assert any("dropped 2 of 5" in note for note in notes)
    from transformers import AutoTokenizer

    rows = AutoTokenizer.from_pretrained(tiny("llama")).batch_decode(found.tokens)
    from_second = ["z" in row for row in rows]
    assert from_second == [False, True, False, True, False, True, False, False]
    assert found.identity["source"] == list(sources) and found.identity["duplicates_dropped"] == 2


def test_evaluation_says_when_it_judges_on_calibration_text(
    toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    lines = [f"def f{i}(x):\n    return x * {i * 7919 % 1009} + {i % 7}  # {i:b}\n" for i in range(400)]
    (tmp_path / "a.txt").write_text("".join(lines[:200]))
    (tmp_path / "b.txt").write_text("".join(lines[200:]))
    data = ("--calib-data", tmp_path / "a.txt", "--calib-samples", 32, "--calib-length", 128)
    made = toolchain("quantize", tiny("qwen3_moe"), "--format", "fp8", *data, "--output", tmp_path / "out")
    assert made.status == 0, made.err
    overlaps = {}
    for name in ("a", "b"):
        given = (
            "evaluate",
            tmp_path / "out",
            "--data",
            tmp_path / f"{name}.txt",
            "--max-tokens",
            2048,
            "--json",
        )
        ran = toolchain(*given)
        assert ran.status == 0, ran.err
        overlaps[name] = ran.json["data"]["calibration_overlap"]
        assert ("TC-525" in ran.err) == (name == "a")
    # Half of the text was calibrated on: 32 x 128 of its bytes.
    share = 32 * 128 / len("".join(lines[:200]))
    assert abs(overlaps["a"] - min(1.0, share)) < 0.25 and overlaps["b"] < 0.05


def test_coverage_of_a_subset_is_that_of_its_samples(tiny: Tiny) -> None:
    model = load_source(tiny("mixtral"), device=CPU)
    coverage: Coverage = run_pass(model, tiny("mixtral"), SMALL).coverage
    path = next(iter(coverage.experts))
    part = coverage.of([1, 6])
    assert torch.equal(part.by_sample(path), coverage.by_sample(path)[[1, 6]])
    assert part.drawn == 2 and coverage.drawn == 8
