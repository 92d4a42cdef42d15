"""engines/*.yaml, planned from the published configurations of the real models."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.architectures import NAMES, Architectures, name_of, recorded, write_config
from tests.conftest import Ran
from toolchain.core.errors import UsageError
from toolchain.core.findings import errors
from toolchain.pipeline.planning import make_request_plan
from toolchain.pipeline.request import EngineRequest, read_spec
from toolchain.plan import Plan

ENGINES = Path(__file__).parent.parent / "engines"
SPECS = tuple(sorted(ENGINES.glob("*.yaml")))
MODELS = ("qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-r1", "deepseek-v3", "gpt-oss-120b", "mixtral-8x7b",
          "llama-4-scout", "glm-4.5", "llama-3.3-70b")  # fmt: skip
GPUS = ("h100", "h200", "b200")
GIB = 1024**3
DISTINCT = tuple(spec for spec in SPECS if not spec.stem.startswith("deepseek-v3"))
"""DeepSeek-V3 has the architecture of R1, and specs that differ in the name of the model only."""
EXPECTED_WARNINGS = {
    "TC-144": "there are no weights beside a config",
    "TC-145": "the source is quantized: DeepSeek's FP8 becomes NVFP4, gpt-oss's other parts are BF16 already",
    "TC-121": "the release's notes on a format",
    "TC-106": "a release that is newer than the tables",
}


@cache
def plan_of(spec: Path, architectures: Architectures, **changes: Any) -> Plan:
    request = read_spec(spec.with_name(spec.name.replace("deepseek-v3", "deepseek-r1")), changes)
    return make_request_plan(request, architectures.get(name_of(request.model)))


def codes(plan: Plan) -> set[str]:
    return {finding.code for finding in plan.findings if finding.severity == "error"}


def messages(plan: Plan) -> str:
    return "\n".join(str(finding) for finding in plan.findings)


def test_every_model_has_a_spec_for_every_gpu() -> None:
    assert {spec.stem for spec in SPECS} == {f"{model}-{gpu}" for model in MODELS for gpu in GPUS}
    for spec in SPECS:
        request = read_spec(spec, {})
        assert spec.stem.endswith(f"-{request.gpu}")
        assert spec.read_text().startswith("# "), f"{spec.name} does not say why it is as it is"


@pytest.mark.parametrize("gpu", GPUS)
def test_specs_of_deepseek_differ_in_the_model_only(gpu: str) -> None:
    first, second = (read_spec(ENGINES / f"deepseek-{kind}-{gpu}.yaml", {}) for kind in ("r1", "v3"))
    assert first.model != second.model and name_of(first.model) == name_of(second.model)
    assert replace(first, model=second.model) == second


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_that_transformers_counts(name: str, architectures: Architectures) -> None:
    """Numbers of parameters, not of modules: transformers holds the experts of a layer in one tensor.

    Multi-token prediction (DeepSeek, GLM) is in no transformers model; Llama 4's vision tower is in its model.
    """
    import torch
    import transformers

    config = recorded(name)["config"]
    builder = getattr(transformers, config["architectures"][0])
    parsed = transformers.AutoConfig.from_pretrained(architectures.get(name).path)
    with torch.device("meta"):
        model = builder._from_config(parsed)
    # Correction biases of routers are buffers: part of the checkpoint, not of num_parameters().
    biases = sum(
        value.numel() for key, value in model.state_dict().items() if key.endswith("correction_bias")
    )
    assert architectures.get(name).parameters == model.num_parameters() + biases


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_model_card(name: str, architectures: Architectures) -> None:
    from toolchain.plan.estimate import active_parameters

    published, info = recorded(name)["published"], architectures.get(name)
    if "parameters" in published:
        assert info.parameters == published["parameters"]
    assert info.parameters / 1e9 == pytest.approx(published["parameters_b"], rel=0.007)
    active, embedding = active_parameters(info), info.vocab_size * info.hidden_size
    if published.get("active_without") == "embed_tokens":
        active -= embedding
    # Cards round to two or three digits, and some leave both ends of the vocabulary out.
    least, most = active - 2 * embedding, active
    rounding = 0.06 if published["active_b"] < 10 else 0.6
    assert least / 1e9 - rounding <= published["active_b"] <= most / 1e9 + rounding


@pytest.mark.parametrize("spec", DISTINCT, ids=lambda spec: spec.stem)
def test_a_spec_plans_cleanly_for_its_gpu(spec: Path, architectures: Architectures) -> None:
    plan = plan_of(spec, architectures)
    assert not errors(plan.findings), messages(plan)
    assert {finding.code for finding in plan.findings} <= set(EXPECTED_WARNINGS), messages(plan)
    figures = plan.estimates
    held = figures.weights_per_gpu_bytes + figures.kv_cache_per_gpu_bytes + figures.activations_per_gpu_bytes
    assert held < figures.gpu_memory_bytes
    ranks = plan.serving.tp if plan.serving.attention_dp else 1
    assert ranks * plan.serving.max_batch_size * plan.serving.max_seq_len >= 16 * 8192


@pytest.mark.parametrize("spec", DISTINCT, ids=lambda spec: spec.stem)
def test_a_spec_takes_no_more_gpus_than_it_must(spec: Path, architectures: Architectures) -> None:
    """On half of them neither the weights nor, for what Hopper has cache left for, its requests fit."""
    plan = plan_of(spec, architectures)
    if plan.serving.tp == 1:
        return
    half = plan_of(spec, architectures, tp=plan.serving.tp // 2, ep=max(1, plan.serving.ep // 2))
    assert "TC-130" in codes(half)


@pytest.mark.parametrize("spec", DISTINCT, ids=lambda spec: spec.stem)
def test_a_spec_is_refused_for_a_gpu_that_cannot_run_it(spec: Path, architectures: Architectures) -> None:
    wanted = read_spec(spec, {})
    if wanted.format == "nvfp4":
        plan = plan_of(spec, architectures, gpu="h100")
        found = next(finding for finding in plan.findings if finding.code == "TC-120")
        assert "nvfp4" in found.message and "h100 (SM90)" in found.message
        assert "MARLIN" in found.hint or not architectures.get(name_of(wanted.model)).is_moe
        assert "--format" in found.hint and "fp8" in found.hint
    else:
        plan = plan_of(spec, architectures, gpu="a100")
        found = next(finding for finding in plan.findings if finding.code == "TC-120")
        assert f"{wanted.format}" in found.message and "a100 (SM80)" in found.message
        # Of MXFP4 the tables say "limited" everywhere: no GPU is named as the nearest one.
        assert "h100" in found.hint or wanted.format == "mxfp4"


def test_a_gpu_with_too_little_memory_is_refused_with_what_would_do(architectures: Architectures) -> None:
    plan = plan_of(ENGINES / "deepseek-r1-h200.yaml", architectures, gpu="h100")
    assert codes(plan) == {"TC-130"}
    assert "GiB" in messages(plan) and "--tp 16" in messages(plan)


def test_blocks_that_ranks_would_cut_are_refused_with_what_keeps_them_whole(
    architectures: Architectures,
) -> None:
    """The shared expert of GLM-4.5 is 1536 wide: 192 over eight ranks, in blocks of 128."""
    plan = plan_of(ENGINES / "glm-4.5-h100.yaml", architectures, attention_dp=False)
    (found,) = [finding for finding in plan.findings if finding.code == "TC-111"]
    assert "1536 over tp=8 gives 192" in found.message
    assert "--tp 4" in found.hint and "--attention-dp" in found.hint


# The arithmetic by hand, from numbers of the published config alone.


def blocks(rows: int, columns: int) -> int:
    """Bytes of a matrix in FP8 with an FP32 scale per 128 x 128."""
    return rows * columns + 4 * -(-rows // 128) * -(-columns // 128)


def test_deepseek_under_attention_data_parallelism_by_hand(architectures: Architectures) -> None:
    plan = plan_of(ENGINES / "deepseek-r1-h200.yaml", architectures)
    hidden, layers, dense, experts, ranks = 7168, 61, 3, 256, 8
    attention = (
        blocks(1536, hidden) + blocks(128 * 192, 1536) + blocks(512 + 64, hidden)
        + blocks(128 * 256, 512) + blocks(hidden, 128 * 128)
    )  # fmt: skip
    norms = 2 * (2 * hidden + 1536 + 512)
    expert = 2 * blocks(2048, hidden) + blocks(hidden, 2048)
    mlp = 2 * blocks(18432, hidden) + blocks(hidden, 18432)
    router = 2 * experts * hidden + 4 * experts
    vocabulary = 2 * 2 * 129280 * hidden + 2 * hidden
    sparse = layers - dense
    expected = layers * (attention + norms) + dense * mlp + vocabulary
    expected += sparse * (router + expert + expert * experts // ranks)
    assert plan.estimates.weights_per_gpu_bytes == pytest.approx(expected, rel=1e-5)
    per_rank = plan.serving.max_batch_size * plan.serving.max_seq_len
    assert plan.estimates.kv_cache_per_gpu_bytes == per_rank * layers * (512 + 64) * 2


def test_attention_data_parallelism_keeps_all_heads_on_each_rank(architectures: Architectures) -> None:
    spec = ENGINES / "qwen3-235b-a22b-h100.yaml"
    cut, whole = (
        plan_of(spec, architectures).estimates,
        plan_of(spec, architectures, attention_dp=True).estimates,
    )
    heads, kv_heads, head_dim, hidden, layers = 64, 4, 128, 4096, 94
    attention = 2 * blocks(heads * head_dim, hidden) + 2 * blocks(kv_heads * head_dim, hidden)
    more = layers * attention * 3 / 4 + 2 * 2 * 151936 * hidden * 3 / 4
    assert whole.weights_per_gpu_bytes - cut.weights_per_gpu_bytes == pytest.approx(more, rel=1e-3)
    assert whole.kv_cache_per_gpu_bytes == 4 * cut.kv_cache_per_gpu_bytes


def test_replicas_of_experts_take_memory(architectures: Architectures) -> None:
    spec = ENGINES / "deepseek-r1-h200.yaml"
    plain, balanced = plan_of(spec, architectures), plan_of(spec, architectures, eplb_slots=288)
    expert = 2 * blocks(2048, 7168) + blocks(7168, 2048)
    more = balanced.estimates.weights_per_gpu_bytes - plain.estimates.weights_per_gpu_bytes
    assert more == pytest.approx(58 * 4 * expert, rel=1e-6)


def test_drafting_layers_are_loaded_only_when_asked_for(architectures: Architectures) -> None:
    """Multi-token prediction as the release stores it: a layer after the last, with experts."""
    info, spec = architectures.get("deepseek-v3"), ENGINES / "deepseek-r1-h200.yaml"
    moved = [item for item in info.tensors if item.name.startswith("model.layers.60.")]
    drafting = tuple(replace(item, name=item.name.replace(".60.", ".61.")) for item in moved)
    with_mtp = replace(info, tensors=(*info.tensors, *drafting))
    request = read_spec(spec, {})
    asked = replace(request, llm_args={"speculative_config": {"decoding_type": "MTP"}})
    base = plan_of(spec, architectures).estimates
    off, on = make_request_plan(request, with_mtp).estimates, make_request_plan(asked, with_mtp).estimates
    assert off.weights_per_gpu_bytes == base.weights_per_gpu_bytes
    routed = sum(item.bytes for item in drafting if ".experts." in item.name)
    rest = sum(item.bytes for item in drafting) - routed
    assert on.weights_per_gpu_bytes - base.weights_per_gpu_bytes == pytest.approx(routed / 8 + rest, rel=1e-6)
    assert on.kv_cache_per_gpu_bytes * 61 == base.kv_cache_per_gpu_bytes * 62


# What users do with specs.


def spec_for(name: str, spec: str, directory: Path) -> Path:
    """A shipped spec that names a local directory instead of the hub."""
    model, text = write_config(name, directory / "model"), (ENGINES / spec).read_text()
    path = directory / spec
    path.write_text(re.sub(r"(?m)^model: .*$", f"model: {model}", text))
    return path


def test_a_spec_is_planned_from_the_command_line(toolchain: Callable[..., Ran], tmp_path: Path) -> None:
    spec = spec_for("mixtral-8x7b", "mixtral-8x7b-b200.yaml", tmp_path)
    ran = toolchain("plan", spec, "--json")
    assert ran.status == 0, ran.err
    assert (ran.json["gpu"], ran.json["format"], ran.json["serving"]["max_batch_size"]) == (
        "b200",
        "nvfp4",
        128,
    )
    refused = toolchain("plan", spec, "--gpu", "h100", "--json")
    assert refused.status == 2
    assert "TC-120" in {finding["code"] for finding in refused.json["findings"]}
    assert toolchain("engine", spec, "--dry-run").status == 0


def test_arguments_of_the_llm_api_pass_through(toolchain: Callable[..., Ran], tmp_path: Path) -> None:
    spec = spec_for("mixtral-8x7b", "mixtral-8x7b-b200.yaml", tmp_path)
    spec.write_text(spec.read_text() + "llm_args:\n  kv_cache_config: {free_gpu_memory_fraction: 0.5}\n")
    ran = toolchain("plan", spec, "--max-num-tokens", 4096, "--no-chunked-prefill", "--json")
    serving = ran.json["serving"]
    assert serving["llm_args"] == {"kv_cache_config": {"free_gpu_memory_fraction": 0.5}}
    assert (serving["max_num_tokens"], serving["chunked_prefill"]) == (4096, False)
    (tmp_path / "more.yaml").write_text("stream_interval: 20\n")
    other = toolchain("plan", spec, "--llm-args", tmp_path / "more.yaml", "--json")
    assert other.json["serving"]["llm_args"] == {"stream_interval": 20}


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    spec = tmp_path / "wrong.yaml"
    spec.write_text("model: m\nformat: fp8\nattention_pd: true\nmax-batchsize: 3\n")
    with pytest.raises(
        UsageError, match=r"attention_pd \(did you mean attention_dp\?\).*max_batch_size"
    ) as found:
        read_spec(spec, {})
    assert found.value.code == "TC-007"


@pytest.mark.parametrize("value", ["[1, 2]", "text", "3"])
def test_arguments_of_the_llm_api_are_a_mapping(value: str, tmp_path: Path) -> None:
    spec = tmp_path / "wrong.yaml"
    spec.write_text(f"model: m\nformat: fp8\nllm_args: {value}\n")
    with pytest.raises(UsageError, match="--llm-args"):
        read_spec(spec, {})


def test_the_readme_says_what_the_plans_say(architectures: Architectures) -> None:
    rows = re.findall(
        r"^\| `([a-z0-9.-]+)` \|[^|]*\| (\d+) \| (\d+) x (\d+) \| ([\d.]+) \| ([\d.]+) \|",
        (ENGINES / "README.md").read_text(), re.MULTILINE,
    )  # fmt: skip
    assert [row[0] for row in rows] == [f"{model}-{gpu}" for model in MODELS for gpu in GPUS]
    for name, gpus, batch, length, weights, kv_cache in rows:
        plan = plan_of(ENGINES / f"{name}.yaml", architectures)
        serving, figures = plan.serving, plan.estimates
        assert int(gpus) == serving.tp * serving.pp, name
        assert (int(batch), int(length)) == (serving.max_batch_size, serving.max_seq_len), name
        assert float(weights) == pytest.approx(figures.weights_per_gpu_bytes / GIB, abs=0.06), name
        assert float(kv_cache) == pytest.approx(figures.kv_cache_per_gpu_bytes / GIB, abs=0.06), name


def test_a_request_says_which_type_it_wants() -> None:
    with pytest.raises(UsageError, match="--eplb-slots is -1"):
        EngineRequest(model="m", format="fp8", eplb_slots=-1)
    with pytest.raises(UsageError, match="--attention-dp is 1"):
        EngineRequest(model="m", format="fp8", attention_dp=1)  # type: ignore[arg-type]
