"""Plans: policies, sizes against packed bytes, findings all at once, and the JSON that later stages read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import DENSE, KINDS, make_tiny
from toolchain.core.codes import CODES
from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.roles import QUANTIZABLE, Role
from toolchain.formats import FORMATS, get_format
from toolchain.models import read_model
from toolchain.plan import Plan, Serving, make_plan, require_clean

Tiny = Callable[[str], Path]

PLAIN = [kind for kind in KINDS if kind not in ("gpt_oss", "llama4_text")]


def tiny_plan(directory: Path, **request: Any) -> Plan:
    return make_plan(read_model(str(directory)), **({"format": "nvfp4"} | request))


def codes(plan: Plan) -> list[str]:
    return [finding.code for finding in plan.findings]


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("format", [item.name for item in FORMATS])
@pytest.mark.parametrize("policy", [None, "mlp-only", "all-linear"])
def test_checkpoint_bytes_are_those_of_packed_tensors(
    kind: str, format: str, policy: str | None, tiny: Tiny
) -> None:
    """Every matrix that the plan quantizes goes through the real packer; everything else keeps its bytes."""
    import torch
    from safetensors.torch import load_file

    from toolchain.codecs import Calibrated, get_codec

    info = read_model(str(tiny(kind)))
    plan = make_plan(info, format=format, policy=policy)
    family, one = info.family, torch.tensor(1.0)
    folded = ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj")
    total = 0
    for name, tensor in load_file(tiny(kind) / "model.safetensors").items():
        found = plan.format_of(family, name)
        if not name.endswith(".weight") or found == "source":
            total += tensor.nbytes
            continue
        keeps = get_format(found).has_pre_quant_scale and (
            not family.norm_folds
            or not (
                name.split(".")[-2] in folded or name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight"))
            )
        )
        scale = torch.ones(tensor.shape[1], dtype=tensor.dtype) if keeps else None
        packed = get_codec(found).pack(
            tensor, Calibrated(weight_amax=one, input_amax=one, pre_quant_scale=scale)
        )
        total += sum(part.nbytes for part in packed.values())
    assert plan.estimates.checkpoint_bytes == total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", [item.name for item in FORMATS])
def test_assignments_cover_every_tensor_once(kind: str, format: str, tiny: Tiny) -> None:
    info = read_model(str(tiny(kind)))
    plan = make_plan(info, format=format)
    assert sum(item.parameters for item in plan.assignments) == info.parameters
    assert sum(item.source_bytes for item in plan.assignments) == info.bytes
    assert sum(item.planned_bytes for item in plan.assignments) == plan.estimates.checkpoint_bytes
    assert all(item.reason for item in plan.assignments)
    for tensor in info.tensors:
        if info.part(tensor.name).role not in QUANTIZABLE:
            assert plan.format_of(info.family, tensor.name) == "source", tensor.name


def test_policies_take_what_they_name(tiny: Tiny) -> None:
    info = read_model(str(tiny("qwen2_moe")))
    expected = {
        "experts-only": {Role.ROUTED_EXPERT},
        "mlp-only": {Role.ROUTED_EXPERT, Role.SHARED_EXPERT},
        "all-linear": {Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.ATTENTION},
    }
    for policy, roles in expected.items():
        plan = make_plan(info, format="fp8", policy=policy)
        assert {item.role for item in plan.assignments if item.format == "fp8"} == {
            role.value for role in roles
        }


@pytest.mark.parametrize("kind", ["qwen3_moe", *DENSE])
def test_default_policy(kind: str, tiny: Tiny) -> None:
    chosen = {item.name: tiny_plan(tiny(kind), format=item.name).policy for item in FORMATS}
    if kind in DENSE:
        assert set(chosen.values()) == {"all-linear"}
    else:
        four_bits = {item.name for item in FORMATS if item.weight_bits == 4}
        assert chosen == {name: "experts-only" if name in four_bits else "all-linear" for name in chosen}


def test_fp8_kv_cache_adds_two_scales_per_layer(tiny: Tiny) -> None:
    plain = tiny_plan(tiny("qwen3_moe")).estimates.checkpoint_bytes
    scaled = tiny_plan(tiny("qwen3_moe"), kv_cache="fp8").estimates.checkpoint_bytes
    assert scaled - plain == 2 * 2 * 4


def test_plan_survives_json(tiny: Tiny) -> None:
    plan = tiny_plan(tiny("qwen3_moe"), gpu="h100", target="trtllm", kv_cache="fp8")
    assert plan.findings
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan


def test_planning_loads_no_torch(tiny: Tiny) -> None:
    script = (
        "import sys; from toolchain.models import read_model; from toolchain.plan import make_plan; "
        f"make_plan(read_model({str(tiny('qwen3_moe'))!r}), format='nvfp4'); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'modelopt', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_every_violation_at_once(tiny: Tiny) -> None:
    serving = Serving(max_batch_size=8, max_seq_len=4096, tp=8, ep=3, pp=3)
    plan = tiny_plan(tiny("qwen3_moe"), gpu="h100", target="trtllm", policy="all-linear", serving=serving)
    assert {"TC-112", "TC-113", "TC-114", "TC-120", "TC-131"} <= set(codes(plan))
    with pytest.raises(FindingsError) as caught:
        require_clean(plan)
    assert caught.value.exit_code == 2
    assert caught.value.findings == plan.findings
    assert all(finding.hint for finding in plan.findings)
    assert all(finding.code in CODES for finding in plan.findings)


def test_a_clean_plan_passes(tiny: Tiny) -> None:
    plan = tiny_plan(tiny("qwen3_moe"))
    assert plan.findings == ()
    assert require_clean(plan) is plan


def test_a_matrix_that_does_not_fit_is_an_error_and_not_skipped(tmp_path: Path) -> None:
    odd = make_tiny("qwen3_moe", tmp_path / "odd", moe_intermediate_size=72)
    plan = tiny_plan(odd, format="nvfp4")
    (finding,) = plan.findings
    assert finding.code == "TC-110"
    assert "8 x down_proj (routed_expert) of shape [128, 72]" in finding.message
    assert "72 is not a multiple of 16" in finding.message
    assert codes(tiny_plan(odd, format="fp8")) == []
    assert codes(tiny_plan(odd, format="int4_awq")) == ["TC-110"]


def test_sources_that_cannot_be_quantized(tiny: Tiny, tmp_path: Path) -> None:
    assert codes(tiny_plan(tiny("llama"), policy="experts-only")) == ["TC-142"]
    shutil.copytree(tiny("qwen3_moe"), tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    (finding,) = tiny_plan(tmp_path / "gptq").findings
    assert finding.code == "TC-141"
    assert "gptq" in finding.message


def test_undeclared_family_is_a_warning(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("qwen3_moe"), tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    config |= {"model_type": "brand_new", "architectures": ["BrandNewForCausalLM"]}
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    plan = tiny_plan(tmp_path / "new")
    assert [(item.code, item.severity) for item in plan.findings] == [("TC-143", "warning")]
    known = tiny_plan(tiny("qwen3_moe"))
    assert plan.estimates.checkpoint_bytes == known.estimates.checkpoint_bytes
    assert plan.estimates.active_parameters == known.estimates.active_parameters


def test_the_local_target_is_one_device(tiny: Tiny) -> None:
    plan = tiny_plan(tiny("qwen3_moe"), serving=Serving(max_batch_size=1, max_seq_len=128, tp=2))
    assert codes(plan) == ["TC-115"]


def test_limits_below_one(tiny: Tiny) -> None:
    plan = tiny_plan(tiny("qwen3_moe"), serving=Serving(max_batch_size=0, max_seq_len=-5, tp=0))
    assert codes(plan) == ["TC-105"] * 3


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"format": "fp3"}, "TC-101"),
        ({"gpu": "z80"}, "TC-102"),
        ({"target": "onnx"}, "TC-103"),
        ({"policy": "some"}, "TC-104"),
        ({"kv_cache": "int2"}, "TC-107"),
        ({"target": "trtllm", "target_version": "latest"}, "TC-106"),
    ],
)
def test_unknown_names_are_usage_errors(request_: dict[str, str], code: str, tiny: Tiny) -> None:
    with pytest.raises(UsageError) as caught:
        tiny_plan(tiny("qwen3_moe"), **request_)
    assert caught.value.code == code


def test_model_of_the_plan_is_absolute(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny("qwen3_moe").parent)
    assert tiny_plan(Path("model")).model == str(tiny("qwen3_moe").resolve())


def test_a_multimodal_wrapper_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    """Its decoder is planned; the vision tower is counted and kept."""
    import transformers

    text = transformers.Llama4TextConfig(
        vocab_size=320, hidden_size=128, intermediate_size=128, intermediate_size_mlp=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=1, max_position_embeddings=512, pad_token_id=1, attention_chunk_size=128,
    )  # fmt: skip
    vision = transformers.Llama4VisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        vision_output_dim=64, projector_input_dim=64, projector_output_dim=64,
    )  # fmt: skip
    config = transformers.Llama4Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    transformers.Llama4ForConditionalGeneration(config).save_pretrained(tmp_path / "saved")
    (tmp_path / "only").mkdir()
    shutil.copy(tmp_path / "saved" / "config.json", tmp_path / "only")
    saved, planned = tiny_plan(tmp_path / "saved"), tiny_plan(tmp_path / "only")
    assert planned.assignments == saved.assignments
    kept = {item.role: item for item in saved.assignments}
    assert kept["other"].format == "source"
    assert kept["other"].parameters > 0
    assert codes(planned) == ["TC-144"]


def test_the_local_target_decodes_what_it_has_no_kernels_for(tiny: Tiny) -> None:
    """The plan must not promise packed weights in memory where they are decoded: on CPUs, and for some formats."""
    packed = tiny_plan(tiny("qwen3_moe"), kv_cache="fp8", gpu="b200", target="trtllm").estimates
    scales = 2 * 2 * 4  # k_scale and v_scale of two layers
    assert packed.weights_per_gpu_bytes == packed.checkpoint_bytes - scales
    on_gpu = tiny_plan(tiny("qwen3_moe"), kv_cache="fp8", gpu="h100").estimates
    assert on_gpu.weights_per_gpu_bytes == packed.weights_per_gpu_bytes
    assert on_gpu.kv_cache_per_gpu_bytes == packed.kv_cache_per_gpu_bytes
    for decoded in (
        tiny_plan(tiny("qwen3_moe"), kv_cache="fp8", gpu="cpu").estimates,
        tiny_plan(tiny("qwen3_moe"), kv_cache="nvfp4", format="mxfp8", gpu="h100").estimates,
    ):
        assert decoded.weights_per_gpu_bytes == decoded.source_bytes
        assert decoded.kv_cache_per_gpu_bytes == 2 * packed.kv_cache_per_gpu_bytes
