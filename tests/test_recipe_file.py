"""ModelOpt recipe files: every general one plans or is refused for a true reason, and enables what ModelOpt enables."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.planning import TEXT
from toolchain.core.errors import UsageError
from toolchain.models import read_model
from toolchain.models.types import ModelInfo
from toolchain.plan import Plan, make_plan
from toolchain.plan.planner import PlanRefused
from toolchain.quantize.recipe_file import RecipeFile, read_recipe_file

Tiny = Callable[[str], Path]


def library() -> Path:
    import modelopt_recipes

    return Path(next(iter(modelopt_recipes.__path__)))


GENERAL = sorted(f"general/ptq/{path.stem}" for path in (library() / "general" / "ptq").glob("*.yaml"))
REFUSED = {
    # The blocks of a cast NVFP4 cache have no calibrated scale; no KV cache format here is that.
    "general/ptq/nvfp4_default-kv_nvfp4_cast": "no KV cache format has these settings",
    # Blocks of 32 without activations: NVFP4 has 16, and W4A8 has FP8 activations.
    "general/ptq/nvfp4_mlp_weight_only": '"-1": 32',
}
INGREDIENTS = {"mse": "mse", "gptq": "gptq", "act_headroom": "headroom", "input_scale1": "pinned"}
"""Fragments of a recipe's name and the ingredient that they stand for."""


def plan_of(info: ModelInfo, name: str, **request: Any) -> Plan:
    found = read_recipe_file(name, info)
    return make_plan(info, **_arguments(found), **request)


def _arguments(found: RecipeFile) -> dict[str, Any]:
    return {
        "format": found.format,
        "policy": "custom",
        "overrides": found.overrides,
        "kv_cache": found.kv_cache,
        "recipe": found.recipe,
    }


@pytest.mark.parametrize("name", GENERAL)
def test_every_general_recipe_plans_or_says_why_not(name: str, tiny: Tiny) -> None:
    info = read_model(str(tiny("qwen2_moe")))
    if name in REFUSED:
        with pytest.raises(PlanRefused) as caught:
            read_recipe_file(name, info)
        assert REFUSED[name] in str(caught.value.findings[0]) and caught.value.exit_code == 2
        return
    plan = plan_of(info, name)
    assert not [item for item in plan.findings if item.severity == "error"]
    stem = name.rpartition("/")[2]
    expected = next((value for key, value in INGREDIENTS.items() if key in stem), "max")
    assert plan.recipe == expected
    kv = stem.partition("-kv_")[2].removesuffix("_layerwise").removesuffix("_layerwise_offload")
    assert plan.kv_cache == {"fp16": "none", "none-gptq": "none", "": "none"}.get(kv, kv)


# (num_bits, block size of the last axis) of weights and inputs, as ModelOpt's documentation of the formats has them.
NUMBERS: dict[str, tuple[Any, Any]] = {
    "fp8": (((4, 3), None), ((4, 3), None)),
    "nvfp4": (((2, 1), 16), ((2, 1), 16)),
    "w4a16_nvfp4": (((2, 1), 16), None),
    "mxfp4": (((2, 1), 32), None),
    "int4_awq": ((4, 128), None),
}


def numbers(quantizer: Any) -> Any:
    if not quantizer.is_enabled:
        return None
    return quantizer.num_bits, (quantizer.block_sizes or {}).get(-1)


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "deepseek_v3", "llama"])
@pytest.mark.parametrize(
    "name",
    [
        "general/ptq/fp8_default-kv_fp8_cast",
        "general/ptq/int4_blockwise_weight_only",
        "general/ptq/mxfp4_mlp_weight_only",
        "general/ptq/nvfp4_experts_only_mse-kv_fp8_cast",
        "general/ptq/nvfp4_omlp_only-kv_fp8",
        "general/ptq/nvfp4_weight_only-kv_fp16",
        "huggingface/qwen3_5_moe/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast",
    ],
)
def test_the_same_modules_in_the_same_numbers_as_modelopt(name: str, kind: str, tiny: Tiny) -> None:
    """ModelOpt applies the recipe to the same unfused model: each Linear has the quantizers of its planned format."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.recipe import load_recipe

    from toolchain.modeling.loading import load_source

    info = read_model(str(tiny(kind)))
    try:
        plan = plan_of(info, name)
    except UsageError as error:
        assert (kind, name.rpartition("/")[2]) == ("llama", "nvfp4_experts_only_mse-kv_fp8_cast"), error
        return
    model = load_source(tiny(kind), device=torch.device("cpu"))
    with contextlib.redirect_stdout(io.StringIO()):
        recipe = load_recipe(name)
        mtq.quantize(model, {"quant_cfg": recipe.quantize.quant_cfg, "algorithm": None})
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) > 10
    for path, linear in linears.items():
        planned = plan.format_of(info.family, info.family.to_checkpoint(path))
        found = (numbers(linear.weight_quantizer), numbers(linear.input_quantizer))
        assert found == NUMBERS.get(planned, (None, None)), path
    caches = {
        (quantizer.is_enabled, bool(quantizer.is_enabled and quantizer._use_constant_amax))
        for path, module in model.named_modules()
        if (quantizer := getattr(module, "k_bmm_quantizer", None)) is not None
    }
    if caches:
        states = {"none": (False, False), "fp8": (True, False), "fp8_cast": (True, True)}
        assert caches == {states[plan.kv_cache]}


HEADER = "metadata: {recipe_type: ptq}\nquantize:\n  algorithm: max\n  quant_cfg:\n"
OFF = "    - {quantizer_name: '*', enable: false}\n"
NVFP4 = "{num_bits: e2m1, block_sizes: {-1: 16, type: dynamic, scale_bits: e4m3}}"
FP8 = "{num_bits: e4m3}"


def write(path: Path, *entries: tuple[str, str]) -> Path:
    """A recipe that switches everything off and then gives each pattern its numbers, weights and inputs."""
    lines = [
        f"    - {{quantizer_name: '{pattern}{kind}_quantizer', cfg: {cfg}}}\n"
        for pattern, cfg in entries
        for kind in ("weight", "input")
    ]
    path.write_text(HEADER + OFF + "".join(lines))
    return path


def test_a_recipe_with_pinned_inputs_needs_no_data(
    toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    """ModelOpt's own recipe, in a directory without any text: every input scale is 1, every expert has one."""
    from safetensors import safe_open

    name = "general/ptq/nvfp4_experts_only_input_scale1-kv_fp8_cast"
    ran = toolchain("quantize", tiny("qwen3_moe"), "--recipe", name, "--output", tmp_path / "out", "--json")
    assert ran.status == 0, ran.err
    assert ran.json["recipe"] == "pinned" and ran.json["calibration"] is None
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        inputs = [file.get_tensor(key) for key in file.keys() if key.endswith(".input_scale")]  # noqa: SIM118
    assert inputs and all(float(value) == 1.0 for value in inputs)
    assert toolchain("verify", tmp_path / "out", "--against", tiny("qwen3_moe")).status == 0


def test_inputs_that_are_pinned_in_part_are_refused(
    toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    pinned = NVFP4.replace("}}", "}, constant_amax: 2688.0}")
    recipe = write(tmp_path / "mine.yaml", ("*.experts.*", pinned), ("*self_attn.*", NVFP4))
    ran = toolchain("plan", tiny("qwen3_moe"), "--recipe", recipe, "--json")
    assert ran.status == 2 and ran.json["error"]["code"] == "TC-159"
    assert "input range of some NVFP4 modules" in ran.json["error"]["message"]


def test_a_recipe_is_quantized_exported_and_verified(
    toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    """Experts NVFP4, attention FP8, in a file of the user's: no --format, and the checkpoint is mixed."""
    recipe = write(tmp_path / "mine.yaml", ("*.experts.*", NVFP4), ("*self_attn.*", FP8))
    data = ("--calib-data", TEXT, "--calib-samples", 4, "--calib-length", 64)
    ran = toolchain(
        "quantize", tiny("qwen3_moe"), "--recipe", recipe, "--output", tmp_path / "out", *data, "--json"
    )
    assert ran.status == 0, ran.err
    assert ran.json["policy"] == "custom" and ran.json["format"] == "nvfp4"
    assert toolchain("verify", tmp_path / "out", "--against", tiny("qwen3_moe")).status == 0
    agreed = toolchain("plan", tiny("qwen3_moe"), "--recipe", recipe, "--format", "fp8", "--json")
    assert agreed.status == 0 and agreed.json["format"] == "nvfp4"


BROKEN: dict[str, tuple[tuple[tuple[str, str], ...], str, str]] = {
    "a router": ((("*.experts.*", NVFP4), ("*mlp.gate*", FP8)), "TC-150", "*mlp.gate*weight_quantizer"),
    "an embedding": ((("*embed*", FP8),), "TC-150", "*embed*weight_quantizer"),
    "q apart from k and v": ((("*q_proj*", FP8),), "TC-152", "*q_proj*weight_quantizer"),
    "down apart": ((("*.experts.*down_proj*", FP8),), "TC-153", "*.experts.*down_proj*weight_quantizer"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_hard_rules_hold_for_recipes_and_name_the_pattern(fault: str, tiny: Tiny, tmp_path: Path) -> None:
    entries, code, said = BROKEN[fault]
    entries = (*entries, ("*o_proj*", FP8))
    recipe = write(tmp_path / "broken.yaml", *entries)
    plan = plan_of(read_model(str(tiny("qwen3_moe"))), str(recipe))
    (found, *_) = [item for item in plan.findings if item.code == code]
    assert f"recipe {recipe}: {said}" in str(found)


def test_one_expert_apart_is_named_with_both_patterns(tiny: Tiny, tmp_path: Path) -> None:
    recipe = write(tmp_path / "broken.yaml", ("*.experts.*", NVFP4), ("*layers.1.*experts.2.*", FP8))
    with pytest.raises(PlanRefused) as caught:
        read_recipe_file(str(recipe), read_model(str(tiny("qwen3_moe"))))
    assert {item.code for item in caught.value.findings} == {"TC-153"}
    text = str(caught.value.findings[0])
    assert "nvfp4 by *.experts.*weight_quantizer" in text and "fp8 by *layers.1.*experts.2.*" in text


def test_all_unknown_settings_are_listed_at_once(tiny: Tiny, tmp_path: Path) -> None:
    recipe = write(tmp_path / "odd.yaml", ("*.experts.*", "{num_bits: 3}"), ("*self_attn.*", "{num_bits: 5}"))
    with pytest.raises(PlanRefused) as caught:
        read_recipe_file(str(recipe), read_model(str(tiny("qwen3_moe"))))
    texts = [str(item) for item in caught.value.findings]
    assert len(texts) == 2 and all("no format has these settings" in text for text in texts)
    assert "24 modules" in texts[1] or "24 modules" in texts[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("general/auto_quantize/nvfp4_fp8_at_5p4bits", "--bits 5.4"),
        ("general/qad/nvfp4_lsq-mse_init-fp8_kv", "toolchain qat --method qad"),
        ("general/speculative_decoding/eagle3", "draft model"),
        ("general/ptq/nothing_of_that_name", "not a recipe that ModelOpt reads"),
        ("absent.yaml", "not a recipe that ModelOpt reads"),
    ],
)
def test_other_recipes_are_refused_with_what_does_it(name: str, said: str, tiny: Tiny) -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe_file(name, read_model(str(tiny("llama"))))
    assert caught.value.code == "TC-159"
    assert said in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    "options",
    [("--policy", "mlp-only"), ("--attention", "fp8"), ("--format", "fp8"), ("--kv-cache", "nvfp4")],
)
def test_options_that_contradict_a_recipe(
    options: tuple[str, str], toolchain: Callable[..., Any], tiny: Tiny
) -> None:
    ran = toolchain(
        "plan", tiny("qwen2_moe"), "--recipe", "general/ptq/nvfp4_experts_only-kv_fp8_cast", *options
    )
    assert ran.status == 2
    assert "TC-159" in ran.err and " ".join(options) in ran.err


def test_the_format_is_required_without_a_recipe_file(toolchain: Callable[..., Any], tiny: Tiny) -> None:
    ran = toolchain("plan", tiny("llama"))
    assert ran.status == 2 and "--format is missing" in ran.err
