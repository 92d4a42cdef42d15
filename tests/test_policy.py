"""Which part gets what: options, protected layers, hard rules, overrides, and mixed checkpoints against ModelOpt's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import TEXT, plan_for
from tests.tiny import make_tiny
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.quant_config import parse_quant_config, read_quant_config
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.errors import UsageError
from toolchain.core.roles import Role
from toolchain.formats import get_format
from toolchain.modeling.loading import load_checkpoint
from toolchain.models import read_model
from toolchain.plan import Override, Plan, PolicyOptions, make_plan
from toolchain.quantize.job import calibrate, quantize

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")


def planned(directory: Path, format: str = "nvfp4", **request: Any) -> Plan:
    names = ("attention", "shared_experts", "lm_head", "protect_first", "protect_last")
    options = PolicyOptions(**{name: request.pop(name) for name in names if name in request})
    return make_plan(read_model(str(directory)), format=format, policy_options=options, **request)


def formats(plan: Plan) -> dict[tuple[str, int | None], str]:
    """(role, layer) -> format, of what is quantized."""
    return {(item.role, item.layer): item.format for item in plan.assignments if item.format != "source"}


def codes(plan: Plan) -> list[str]:
    return [finding.code for finding in plan.findings]


def by_role(plan: Plan) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for item in plan.assignments:
        found.setdefault(item.role, set()).add(item.format)
    return found


def test_experts_only_gives_shared_experts_fp8_and_says_why(tiny: Tiny) -> None:
    plan = planned(tiny("qwen2_moe"))
    assert plan.policy == "experts-only"
    expected = {"routed_expert": {"nvfp4"}, "shared_expert": {"fp8"}, "attention": {"source"}}
    assert {role: found for role, found in by_role(plan).items() if role in expected} == expected
    (one,) = {item.source for item in plan.assignments if item.role == "shared_expert"}
    assert "Nemotron" in one
    assert by_role(planned(tiny("qwen2_moe"), "fp8", policy="experts-only"))["shared_expert"] == {"source"}
    assert by_role(planned(tiny("qwen2_moe"), policy="mlp-only"))["shared_expert"] == {"nvfp4"}


@pytest.mark.parametrize(
    ("options", "role", "format"),
    [
        ({"attention": "fp8"}, "attention", "fp8"),
        ({"attention": "same"}, "attention", "nvfp4"),
        ({"attention": "bf16", "policy": "all-linear"}, "attention", "source"),
        ({"shared_experts": "bf16"}, "shared_expert", "source"),
        ({"shared_experts": "same"}, "shared_expert", "nvfp4"),
        ({"lm_head": "fp8"}, "lm_head", "fp8"),
        ({"lm_head": "same"}, "lm_head", "nvfp4"),
        ({"policy": "all-linear"}, "lm_head", "source"),
    ],
)
def test_options_win_over_the_policy(tiny: Tiny, options: dict[str, Any], role: str, format: str) -> None:
    plan = planned(tiny("qwen2_moe"), **options)
    assert by_role(plan)[role] == {format}
    assert codes(plan) == []


@pytest.mark.parametrize("main", ["fp8_block", "fp8_per_channel_per_token", "mxfp8"])
def test_fp8_beside_a_format_of_eight_bits_is_that_format(tiny: Tiny, main: str) -> None:
    plan = planned(tiny("qwen2_moe"), main, policy="experts-only", attention="fp8")
    assert by_role(plan)["attention"] == {main}


def test_dense_lead_layers_are_protected_from_four_bits(tiny: Tiny) -> None:
    """DeepSeek's first_k_dense_replace is 1 here: layer 0 is dense, layer 1 has experts."""
    whole = {"policy": "all-linear"}
    assert {layer for _, layer in formats(planned(tiny("deepseek_v3"), **whole))} == {1}
    assert {layer for _, layer in formats(planned(tiny("deepseek_v3"), protect_first=0, **whole))} == {0, 1}
    assert {layer for _, layer in formats(planned(tiny("deepseek_v3"), "fp8", **whole))} == {0, 1}
    assert {layer for _, layer in formats(planned(tiny("llama"), **whole))} == {0, 1}


def test_protected_layers_keep_everything_experts_included(tiny: Tiny) -> None:
    plan = planned(tiny("qwen3_moe"), policy="all-linear", protect_first=1)
    assert {layer for _, layer in formats(plan)} == {1}
    assert {item.source for item in plan.assignments if item.layer == 0} == {"--protect-first 1"}
    last = planned(tiny("qwen3_moe"), protect_last=1)
    assert formats(last) == {("routed_expert", 0): "nvfp4"}
    assert codes(plan) == codes(last) == []
    assert codes(planned(tiny("qwen3_moe"), protect_last=9)) == ["TC-142"]


def test_values_that_do_not_exist_are_named_together() -> None:
    with pytest.raises(UsageError, match=r"--attention is 'int3'.*--protect-last is -1"):
        PolicyOptions(attention="int3", protect_last=-1)


def test_the_default_follows_what_the_target_loads(tiny: Tiny) -> None:
    """TensorRT-LLM's DeepSeek loader takes shared and routed experts in two formats; pull requests 11215 and 18393."""
    where = {"gpu": "b200", "target": "trtllm"}
    since = planned(tiny("deepseek_v3"), target_version="1.3.0rc29", **where)
    assert by_role(since)["shared_expert"] == {"fp8"}
    assert by_role(planned(tiny("deepseek_v3"), **where))["shared_expert"] == {"source"}
    other = planned(tiny("qwen2_moe"), **where)
    assert by_role(other)["shared_expert"] == {"source"} and codes(other) == []
    assert codes(planned(tiny("qwen2_moe"), shared_experts="fp8", **where)) == ["TC-126"]
    assert codes(planned(tiny("qwen2_moe"), shared_experts="same", **where)) == []
    later = planned(tiny("qwen2_moe"), shared_experts="fp8", target_version="1.4.0rc1", **where)
    assert [(item.code, item.severity) for item in later.findings] == [("TC-126", "warning")]


def test_fp8_where_the_gpu_has_none(tiny: Tiny) -> None:
    where = {"format": "w4a16_nvfp4", "gpu": "a100", "target": "trtllm", "target_version": "1.4.0rc1"}
    assert by_role(planned(tiny("deepseek_v3"), **where))["shared_expert"] == {"source"}
    asked = planned(tiny("deepseek_v3"), attention="fp8", **where)
    assert "TC-120" in codes(asked)


def test_a_head_that_shares_the_embedding_stays(tmp_path: Path) -> None:
    tied = make_tiny("qwen3_moe", tmp_path / "tied", tie_word_embeddings=True)
    assert codes(planned(tied, lm_head="fp8")) == ["TC-156"]


def override(role: Role, format: str, layer: int | None = 0, *projections: str) -> Override:
    return Override(role=role, layer=layer, projections=projections, format=format, source="a search")


def test_overrides_split_a_role_by_projection_and_stay_exact(tiny: Tiny, tmp_path: Path) -> None:
    """o_proj of layer 1 alone; the bytes of the checkpoint are those of the plan, checked by the audit."""
    chosen = [
        override(Role.ATTENTION, "fp8", 1, "o_proj"),
        override(Role.ATTENTION, "nvfp4", 0, "q_proj", "k_proj", "v_proj"),
    ]
    plan = plan_for(tiny("qwen3_moe"), "nvfp4", overrides=chosen)
    split = {
        (item.layer, item.projections): item.format for item in plan.assignments if item.role == "attention"
    }
    assert split == {
        (0, ("k_proj", "q_proj", "v_proj")): "nvfp4",
        (0, ("o_proj",)): "source",
        (1, ("k_proj", "q_proj", "v_proj")): "source",
        (1, ("o_proj",)): "fp8",
    }
    quantize(plan, tmp_path / "out", device="cpu")
    verdict = audit(tmp_path / "out", against=tiny("qwen3_moe"))
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("chosen", "code", "said"),
    [
        ([override(Role.ROUTER, "fp8")], "TC-150", "routers and gates"),
        ([override(Role.NORM, "fp8")], "TC-150", "norms"),
        ([override(Role.EMBEDDING, "fp8", None)], "TC-150", "embeddings"),
        ([override(Role.SHARED_EXPERT, "fp8", 0)], "TC-151", "does not have"),
        ([override(Role.ATTENTION, "fp8", 0, "x_proj")], "TC-151", "x_proj"),
        ([override(Role.ATTENTION, "fp8", 0, "q_proj")], "TC-152", "one matmul"),
        ([override(Role.ROUTED_EXPERT, "fp8", 0, "down_proj")], "TC-153", "one kernel"),
        ([override(Role.ROUTED_EXPERT, "source", 0)], "TC-154", "50.0%"),
    ],
)
def test_hard_rules_hold_whoever_decides(tiny: Tiny, chosen: list[Override], code: str, said: str) -> None:
    plan = planned(tiny("qwen3_moe"), overrides=chosen)
    assert codes(plan) == [code]
    assert said in plan.findings[0].message
    for name in ("model.layers.0.mlp.gate", "model.embed_tokens", "model.norm"):
        assert plan.format_of(read_model(str(tiny("qwen3_moe"))).family, name) == "source"


def test_every_broken_rule_is_listed_at_once(tiny: Tiny) -> None:
    chosen = [
        override(Role.ROUTER, "fp8"),
        override(Role.ATTENTION, "fp8", 0, "q_proj"),
        override(Role.ROUTED_EXPERT, "fp8", 1, "up_proj"),
    ]
    assert codes(planned(tiny("qwen3_moe"), overrides=chosen)) == ["TC-150", "TC-152", "TC-153"]


MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "shared experts": ("qwen2_moe", {}),
    "attention and head": ("deepseek_v3", {"attention": "fp8", "lm_head": "same"}),
    "protected first": ("mixtral", {"attention": "fp8", "protect_first": 1}),
    "dense": ("llama", {"policy": "mlp-only", "attention": "fp8"}),
}


@pytest.fixture(scope="module")
def mixed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, (kind, asked) in MIXED.items():
        options = dict(asked)
        policy = options.pop("policy", None)
        plan = plan_for(tiny(kind), "nvfp4", policy=policy, policy_options=PolicyOptions(**options))
        found[name] = tmp_path_factory.mktemp("mixed") / "out"
        quantize(plan, found[name], device="cpu")
    return found


@pytest.mark.parametrize("name", MIXED)
def test_mixed_checkpoints_pass_their_audit_and_run(mixed: dict[str, Path], tiny: Tiny, name: str) -> None:
    verdict = audit(mixed[name], against=tiny(MIXED[name][0]))
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    assert set(verdict.facts["by_algo"]) == {"NVFP4", "FP8"}
    logits = load_checkpoint(mixed[name], device=CPU)(torch.arange(2, 40)[None]).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", MIXED)
def test_mixed_configs_name_every_module_with_its_bytes(mixed: dict[str, Path], name: str) -> None:
    """TensorRT-LLM matches exact names, and asks for a layer's experts by the name of their parent."""
    legacy = json.loads((mixed[name] / "hf_quant_config.json").read_text())["quantization"]
    assert legacy["quant_algo"] == "MIXED_PRECISION"
    layers, reader = legacy["quantized_layers"], CheckpointReader(mixed[name])
    stored = {"F8_E4M3": {"quant_algo": "FP8"}, "U8": {"quant_algo": "NVFP4", "group_size": 16}}
    exact = {
        module.removesuffix(".weight"): stored[info.dtype]
        for module, info in reader.infos.items()
        if module.endswith(".weight") and info.dtype in stored
    }
    parents = {
        key.split(".experts.")[0] + ".experts": entry for key, entry in exact.items() if ".experts." in key
    }
    assert layers == exact | parents
    inline = json.loads((mixed[name] / "config.json").read_text())["quantization_config"]
    flat, read = parse_quant_config(inline, "config.json"), read_quant_config(mixed[name])
    assert read is not None
    assert (flat.quant_algo, flat.quantized_layers, flat.exclude_modules) == (
        read.quant_algo, read.quantized_layers, read.exclude_modules,
    )  # fmt: skip


def test_mixed_logits_equal_the_model_that_modelopt_fake_quantized(tiny: Tiny, tmp_path: Path) -> None:
    from toolchain.core.progress import Silent

    options = PolicyOptions(attention="same", shared_experts="fp8")
    plan = plan_for(tiny("qwen2_moe"), "nvfp4", policy_options=options)
    done = calibrate(plan, device="cpu", dtype=torch.float32)
    (tmp_path / "out").mkdir()
    done.exporter.write(tmp_path / "out", Silent())
    model = load_checkpoint(tmp_path / "out", device=CPU, dtype=torch.float32)
    tokens = torch.randint(4, 260, (2, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, done.model(tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe"])
def test_mixed_bytes_and_entries_are_those_of_modelopts_own_exporter(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    """One calibrated model in two formats, two exporters: every tensor, and each entry of quantized_layers.

    Of FP8 weights some are the neighbouring code: ModelOpt divides bf16 by the scale, and so rounds twice.
    """
    from modelopt.torch.export import export_hf_checkpoint

    from toolchain.core.progress import Silent

    policy, options = ("mlp-only", {"attention": "fp8"}) if kind == "llama" else (None, {})
    plan = plan_for(tiny(kind), "nvfp4", policy=policy, policy_options=PolicyOptions(**options))
    done = calibrate(plan, device="cpu")
    (tmp_path / "ours").mkdir()
    done.exporter.write(tmp_path / "ours", Silent())
    export_hf_checkpoint(done.model, export_dir=tmp_path / "theirs")
    ours, theirs = CheckpointReader(tmp_path / "ours"), CheckpointReader(tmp_path / "theirs")
    assert set(ours.infos) == set(theirs.infos)
    for name, info in ours.infos.items():
        left, right = ours.get(name).float(), theirs.get(name).float()
        if info.dtype == "F8_E4M3" and name.endswith(".weight"):
            assert float((left != right).float().mean()) < 0.06, name
            assert float(((left - right).abs() / left.abs().clamp(min=1)).max()) <= 1 / 8, name
        else:
            assert torch.equal(left, right), name
    ours_config, theirs_config = (
        json.loads((tmp_path / side / "hf_quant_config.json").read_text())["quantization"]
        for side in ("ours", "theirs")
    )
    assert ours_config["quant_algo"] == theirs_config["quant_algo"] == "MIXED_PRECISION"
    mine, modelopts = ours_config["quantized_layers"], theirs_config["quantized_layers"]
    assert all(name.endswith(".experts") for name in set(mine) - set(modelopts))
    assert {name: mine[name] for name in modelopts} == modelopts


ENTRIES = (
    "fp8", "fp8_per_channel_per_token", "nvfp4", "w4a16_nvfp4", "w4a8_nvfp4_fp8", "mxfp8", "int4_awq", "w4a8_awq",
    "int8_sq", "int8_wo",
)  # fmt: skip
"""Formats that ModelOpt's config names as TensorRT-LLM does; it writes its own names for fp8_block and mxfp4."""


@pytest.mark.parametrize("format", ENTRIES)
def test_entries_have_the_keys_of_modelopts_config(format: str) -> None:
    from modelopt.torch.export.quant_utils import process_layer_quant_config

    from toolchain.checkpoint.quant_config import layer_entry

    found = get_format(format)
    asked = {
        "a.quantization": found.modelopt_format,
        "a.awq_block_size": found.group_size or 0,
        "b.quantization": "fp8" if format != "fp8" else "nvfp4",
        "b.awq_block_size": 16,
    }
    assert layer_entry(found) == process_layer_quant_config(asked)["quantized_layers"]["a"]


def edit_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change quantized_layers in both places."""
    for name, key in (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config")):
        value = json.loads((directory / name).read_text())
        change(value[key]["quantized_layers"])
        (directory / name).write_text(json.dumps(value))


def wrong_prefix(layers: dict[str, Any]) -> None:
    for name in list(layers):
        layers[f"language_model.{name}"] = layers.pop(name)


EXPERT = "model.layers.0.mlp.experts.1.down_proj"
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a wrong prefix": (wrong_prefix, "TC-315"),
    "a module is not named": (lambda layers: layers.pop(EXPERT), "TC-315"),
    "a plain module is named": (lambda layers: layers.update(lm_head={"quant_algo": "FP8"}), "TC-315"),
    "the parent says another format": (
        lambda layers: layers.update({"model.layers.0.mlp.experts": {"quant_algo": "FP8"}}), "TC-315",
    ),
    "an expert in another format": (lambda layers: layers[EXPERT].update(quant_algo="FP8"), "TC-322"),
    "siblings in two formats": (
        lambda layers: layers.pop("model.layers.0.mlp.shared_expert.up_proj"), "TC-335",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_in_a_mixed_config_are_found(
    mixed: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    change, code = FAULTS[fault]
    shutil.copytree(mixed["shared experts"], tmp_path / "out")
    edit_config(tmp_path / "out", change)
    assert code in {finding.code for finding in audit(tmp_path / "out").findings}


def test_the_plan_prints_who_decided(toolchain: Callable[..., Any], tiny: Tiny) -> None:
    arguments = ("--format", "nvfp4", "--policy", "all-linear", "--attention", "fp8")
    ran = toolchain("plan", tiny("deepseek_v3"), *arguments)
    assert ran.status == 0
    assert "all-linear, attention fp8: fp8, nvfp4 and the source dtype" in ran.out
    for said in (
        "--attention fp8",
        "dense layers before the first MoE layer",
        "hard rule",
        "policy all-linear",
    ):
        assert said in ran.out
    value = toolchain("plan", tiny("deepseek_v3"), *arguments, "--json").json
    assert value["policy_options"]["attention"] == "fp8"


def test_a_spec_has_the_same_keys(toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path) -> None:
    spec = tmp_path / "engine.yaml"
    spec.write_text(
        f"model: {tiny('qwen2_moe')}\nformat: nvfp4\nattention: fp8\nshared_experts: same\nprotect_first: 1\n"
        f"calib_data: {TEXT}\n"
    )
    plan = toolchain("engine", spec, "--dry-run", "--json").json
    found = {(item["role"], item["layer"]): item["format"] for item in plan["assignments"]}
    assert found["attention", 1] == "fp8" and found["shared_expert", 1] == "nvfp4"
    assert found["routed_expert", 0] == "source"
