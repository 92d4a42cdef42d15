"""Planted faults: each is found by its code, in the bytes alone, and a sound checkpoint has none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from toolchain.checkpoint.audit import audit
from toolchain.core.errors import ToolchainError
from toolchain.quantize.job import quantize

Tiny = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.1.mlp.experts.2"


@pytest.fixture(scope="module")
def sound(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(format_name: str) -> Path:
        if format_name not in made:
            output = tmp_path_factory.mktemp("sound") / format_name
            plan = plan_for(tiny("qwen3_moe"), format_name, policy="all-linear", kv_cache="fp8")
            quantize(plan, output, device="cpu")
            made[format_name] = output
        return made[format_name]

    return get


def damaged(source: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy whose tensors went through ``change``; plan.json is left out, as in a checkpoint from elsewhere."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    (target / "plan.json").unlink()
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def drop(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name])

    return change


def expert_in_bf16(tensors: Tensors) -> None:
    for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
        del tensors[f"{EXPERT}.down_proj.{suffix}"]
    tensors[f"{EXPERT}.down_proj.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)


def router_quantized(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.gate"
    tensors[f"{name}.weight"] = torch.zeros(4, 64, dtype=torch.uint8)
    tensors[f"{name}.weight_scale"] = torch.ones(4, 8).to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale_2"] = torch.tensor(1.0)
    tensors[f"{name}.input_scale"] = torch.tensor(1.0)


FAULTS: dict[str, tuple[Callable[[Tensors], None], str, str]] = {
    "no input scale": (drop(f"{EXPERT}.up_proj.input_scale"), "TC-310", f"{EXPERT}.up_proj.input_scale"),
    "no block scales": (drop(f"{EXPERT}.up_proj.weight_scale"), "TC-310", f"{EXPERT}.up_proj.weight"),
    "scale dtype": (
        put(f"{EXPERT}.up_proj.weight_scale", lambda t: t.float()),
        "TC-311",
        f"{EXPERT}.up_proj",
    ),
    "half scales": (put(f"{EXPERT}.up_proj.weight_scale", lambda t: t[:, :4]), "TC-312", f"{EXPERT}.up_proj"),
    "unpacked": (put(f"{EXPERT}.up_proj.weight", lambda t: t.repeat(1, 2)), "TC-312", f"{EXPERT}.up_proj"),
    "zero scale": (
        put(f"{EXPERT}.up_proj.input_scale", lambda t: t * 0),
        "TC-314",
        f"{EXPERT}.up_proj.input_scale",
    ),
    "infinite": (put(f"{EXPERT}.up_proj.weight_scale_2", lambda t: t / 0), "TC-314", f"{EXPERT}.up_proj"),
    "nan code": (
        put(
            "model.layers.0.self_attn.q_proj.weight_scale",
            lambda t: (t.view(torch.uint8) | 0x7F).view(t.dtype),
        ),
        "TC-314",
        "model.layers.0.self_attn.q_proj.weight_scale",
    ),
    "gate and up differ": (
        put(f"{EXPERT}.up_proj.weight_scale_2", lambda t: t * 2),
        "TC-325",
        f"{EXPERT}.up_proj",
    ),
    "q and v differ": (
        put("model.layers.0.self_attn.v_proj.input_scale", lambda t: t * 1.5),
        "TC-325",
        "model.layers.0.self_attn.v_proj.input_scale",
    ),
    "expert gone": (
        drop(*(f"{EXPERT}.up_proj.{s}" for s in ("weight", "weight_scale", "weight_scale_2", "input_scale"))),
        "TC-318",
        f"{EXPERT}.up_proj.weight",
    ),
    "norm gone": (drop("model.norm.weight"), "TC-319", "model.norm.weight"),
    "expert in bf16": (expert_in_bf16, "TC-322", "layer 1"),
    "expert in bf16, listed": (expert_in_bf16, "TC-316", f"{EXPERT}.down_proj"),
    "router quantized": (router_quantized, "TC-321", "model.layers.0.mlp.gate"),
    "one of two KV scales": (
        drop("model.layers.0.self_attn.v_proj.v_scale"),
        "TC-324",
        "model.layers.0.self_attn",
    ),
    "KV scale per head": (
        put("model.layers.0.self_attn.k_proj.k_scale", lambda t: t.repeat(2)),
        "TC-312",
        "model.layers.0.self_attn.k_proj.k_scale",
    ),
    "KV scale of another dtype": (
        put("model.layers.0.self_attn.k_proj.k_scale", lambda t: torch.ones((), dtype=torch.uint8)),
        "TC-311",
        "model.layers.0.self_attn.k_proj.k_scale",
    ),
    "leaked scale": (
        lambda tensors: tensors.update({"model.norm.weight_scale": torch.ones(1)}),
        "TC-310",
        "model.norm.weight_scale_2",
    ),
    "foreign tensor": (
        lambda tensors: tensors.update({f"{EXPERT}.up_proj.weight_amax": torch.ones(1)}),
        "TC-313",
        f"{EXPERT}.up_proj.weight_amax",
    ),
}


@pytest.mark.parametrize("format_name", ["fp8", "nvfp4", "int4_awq"])
def test_a_sound_checkpoint_has_no_finding(
    sound: Callable[[str], Path], tiny: Tiny, format_name: str
) -> None:
    verdict = audit(sound(format_name), against=tiny("qwen3_moe"))
    # AWQ folds scales into norms: said as a warning, never an error.
    assert {(item.code, item.severity) for item in verdict.findings} <= {("TC-327", "warning")}
    assert verdict.passed and bool(verdict.findings) == (format_name == "int4_awq")
    assert verdict.facts["by_role"] == {"attention": 8, "routed_expert": 24}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_planted_faults_are_found(sound: Callable[[str], Path], tmp_path: Path, fault: str) -> None:
    change, code, where = FAULTS[fault]
    verdict = audit(damaged(sound("nvfp4"), tmp_path / "bad", change))
    assert not verdict.passed
    assert any(item.code == code and item.where.startswith(where) for item in verdict.findings), (
        verdict.findings
    )


def edit_json(directory: Path, name: str, change: Callable[[Any], None]) -> None:
    value = json.loads((directory / name).read_text())
    change(value)
    (directory / name).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("hf_quant_config.json", lambda v: v["quantization"]["exclude_modules"].remove("lm_head"), "TC-316"),
        (
            "hf_quant_config.json",
            lambda v: v["quantization"]["exclude_modules"].append("backbone.head"),
            "TC-317",
        ),
        (
            "hf_quant_config.json",
            lambda v: v["quantization"]["exclude_modules"].append("model.layers.0.self_attn.q_proj"),
            "TC-315",
        ),
        ("hf_quant_config.json", lambda v: v["quantization"].update(kv_cache_quant_algo=None), "TC-324"),
        ("hf_quant_config.json", lambda v: v["quantization"].update(group_size=32), "TC-340"),
        ("config.json", lambda v: v["quantization_config"].update(quant_algo="FP8"), "TC-323"),
        ("config.json", lambda v: v["quantization_config"].update(group_size=32), "TC-323"),
        ("config.json", lambda v: v.update(num_local_experts=5), "TC-318"),
        ("config.json", lambda v: v.update(moe_intermediate_size=256), "TC-312"),
    ],
)
def test_faults_of_the_configs_are_found(
    sound: Callable[[str], Path], tmp_path: Path, name: str, change: Callable[[Any], None], code: str
) -> None:
    shutil.copytree(sound("nvfp4"), tmp_path / "bad")
    edit_json(tmp_path / "bad", name, change)
    assert code in {item.code for item in audit(tmp_path / "bad").findings if item.severity == "error"}


@pytest.fixture(scope="module")
def modelopt_alone(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``<kind>-<preset>`` -> a checkpoint that ModelOpt quantized and exported without us."""
    output = tmp_path_factory.mktemp("modelopt")
    sources = [str(tiny(kind)) for kind in ("qwen3_moe", "mixtral", "deepseek_v3")]
    command = [sys.executable, "-m", "tests.modelopt_alone", str(output), *sources]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
    return {path.name: path for path in output.iterdir() if path.is_dir()}


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("preset", ["NVFP4_EXPERTS_ONLY_CFG", "FP8_DEFAULT_CFG"])
def test_a_checkpoint_that_modelopt_made_alone_is_audited_and_runs(
    modelopt_alone: dict[str, Path], kind: str, preset: str
) -> None:
    """Fused experts, its exporter, no code of ours but the NVFP4 backend."""
    from safetensors.torch import load_file

    from toolchain.modeling.loading import load_checkpoint

    theirs = next(
        path for name, path in modelopt_alone.items() if name.startswith(kind) and name.endswith(preset)
    )
    for _ in range(2):
        verdict = audit(theirs)
        assert verdict.passed, [str(item) for item in verdict.findings]
        # Its FP8 exports keep a scale each for q, k and v: runtimes requantize, which is worth a warning.
        assert {item.code for item in verdict.findings} <= ({"TC-325"} if "FP8" in preset else set())
        (theirs / "hf_quant_config.json").unlink(
            missing_ok=True
        )  # the second time: config.json's flat shape alone
    if "NVFP4" in preset:
        expected = load_file(theirs.with_suffix(".expected"))
        with torch.no_grad():
            logits = load_checkpoint(theirs, device=torch.device("cpu"))(expected["tokens"]).logits
        assert torch.equal(logits, expected["logits"])


def test_a_changed_router_and_a_changed_size_are_found(
    sound: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    router = "model.layers.0.mlp.gate.weight"
    bad = damaged(sound("fp8"), tmp_path / "bad", put(router, lambda t: t * 1.001 + 0.01))
    assert audit(bad).passed
    found = audit(bad, against=tiny("qwen3_moe")).findings
    assert [(item.code, item.where) for item in found] == [("TC-327", router)]
    shutil.copy(sound("fp8") / "plan.json", bad / "plan.json")
    assert audit(bad).passed
    edit_json(bad, "plan.json", lambda v: v["estimates"].update(checkpoint_bytes=1))
    assert {item.code for item in audit(bad).findings} == {"TC-330"}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
            "cut off",
        ),
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "hf_quant_config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "hf_quant_config.json").write_text('{"a": 1}'), "quant_algo"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(
    sound: Callable[[str], Path], tmp_path: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    shutil.copytree(sound("fp8"), tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises(ToolchainError, match=said):
        audit(tmp_path / "bad")
