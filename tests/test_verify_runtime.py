"""Rules of TensorRT-LLM's releases: which configs they read, which algorithms they know, which shapes they cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.audit.runtime import Runtime
from toolchain.core.errors import UsageError
from toolchain.core.findings import Finding
from toolchain.formats import FORMATS
from toolchain.quantize.job import quantize
from toolchain.targets import checkpoint_rules as rules

Tiny = Callable[[str], Path]
RELEASES = ("1.0.0", "1.1.0", "1.2.1", "1.3.0rc5", "1.3.0rc22", "1.4.0rc1")
NEW = "1.4.0rc1"


@pytest.fixture(scope="module")
def sound(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(kind: str, format_name: str, **options: Any) -> Path:
        key = f"{kind} {format_name} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("sound") / "out"
            quantize(plan_for(tiny(kind), format_name, **options), made[key], device="cpu")
        return made[key]

    return get


@pytest.fixture
def changed(sound: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a sound checkpoint without its plan, after ``change(directory)``."""

    def make(change: Callable[[Path], Any], kind: str, format_name: str, **options: Any) -> Path:
        bad = tmp_path / "bad"
        shutil.copytree(sound(kind, format_name, **options), bad)
        (bad / "plan.json").unlink()
        change(bad)
        return bad

    return make


def found(directory: Path, version: str = NEW, **ranks: int) -> dict[str, str]:
    """Code -> severity of what is found with a release and not without."""
    before = set(map(str, audit(directory).findings))
    after = audit(directory, target=Runtime(version=version, **ranks)).findings
    return {item.code: item.severity for item in after if str(item) not in before}


def say(directory: Path, name: str, change: Callable[[Any], Any]) -> None:
    value = json.loads((directory / name).read_text())
    change(value)
    (directory / name).write_text(json.dumps(value))


def tensors_of(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")


@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize(
    ("kind", "format_name"), [("qwen3_moe", "nvfp4"), ("mixtral", "fp8"), ("llama", "int4_awq")]
)
def test_what_is_written_here_loads_everywhere(
    sound: Callable[..., Path], kind: str, format_name: str, version: str
) -> None:
    assert found(sound(kind, format_name, kv_cache="fp8"), version) == {}


def only_flat(directory: Path) -> None:
    (directory / "hf_quant_config.json").unlink()


def flat_file(directory: Path) -> None:
    inline = json.loads((directory / "config.json").read_text())["quantization_config"]
    (directory / "hf_quant_config.json").write_text(json.dumps(inline))


@pytest.mark.parametrize("change", [only_flat, flat_file])
@pytest.mark.parametrize(("kind", "format_name"), [("qwen3_moe", "nvfp4"), ("llama", "fp8")])
def test_the_flat_shape_needs_the_1_3_line(
    changed: Callable[..., Path], change: Callable[[Path], None], kind: str, format_name: str
) -> None:
    bad = changed(change, kind, format_name, kv_cache="fp8")
    assert found(bad, "1.2.1") == {"TC-339": "error"}
    assert found(bad, "1.3.0rc5") == {"TC-339": "warning"}
    assert found(bad, NEW) == {}
    said = [str(item) for item in audit(bad, target=Runtime(version="1.3.0rc5")).findings]
    assert any("unverified" in text for text in said)


@pytest.mark.parametrize(
    ("format_name", "version", "code"),
    [
        # QuantAlgo in the documentation of 1.0.0, 1.2.1, 1.3.0rc20 and 1.3.0rc22 (gh-pages, quantization/mode).
        ("w4a16_nvfp4", "1.3.0rc20", "error"),
        ("w4a16_nvfp4", "1.3.0rc22", None),
        ("mxfp8", "1.2.1", "error"),
        ("mxfp8", "1.3.0rc5", "warning"),
        ("mxfp8", "1.3.0rc20", None),
        ("mxfp4", "1.0.0", "error"),
        ("mxfp4", "1.2.1", None),
        ("w4a8_nvfp4_fp8", "1.0.0", "error"),
        ("w4a8_nvfp4_fp8", "1.2.1", None),
        ("nvfp4", "1.0.0", None),
    ],
)
def test_algorithms_that_a_release_does_not_know(
    sound: Callable[..., Path], format_name: str, version: str, code: str | None
) -> None:
    assert found(sound("qwen3_moe", format_name), version).get("TC-338") == code


def test_an_algorithm_that_no_release_knows(changed: Callable[..., Path]) -> None:
    def lie(directory: Path) -> None:
        say(directory, "hf_quant_config.json", lambda v: v["quantization"].update(quant_algo="FP8_PB_WO"))

    # ModelOpt's exporter writes it in lower case, which the loader translates.
    assert found(changed(lie, "llama", "fp8_block")) == {"TC-338": "error"}


def test_every_format_here_has_a_line_in_the_table() -> None:
    assert {item.quant_algo for item in FORMATS} <= set(rules.QUANT_ALGOS)
    assert rules.QUANT_ALGOS["FP8"].state("1.2.1") == "yes"
    assert rules.QUANT_ALGOS["NVFP4_SVD"].state("1.2.1") == "no"
    assert rules.QUANT_ALGOS["NVFP4_SVD"].state(NEW) == "unverified"


def test_a_kv_cache_that_no_release_has_or_that_a_flat_config_loses(changed: Callable[..., Path]) -> None:
    def lie(directory: Path) -> None:
        say(directory, "hf_quant_config.json", lambda v: v["quantization"].update(kv_cache_quant_algo="FP4"))

    assert found(changed(lie, "llama", "fp8", kv_cache="fp8")) == {"TC-338": "error"}


def test_an_nvfp4_cache_in_a_flat_config(changed: Callable[..., Path]) -> None:
    def lie(directory: Path) -> None:
        only_flat(directory)
        scheme = {"type": "float", "num_bits": 4, "dynamic": False}
        say(directory, "config.json", lambda v: v["quantization_config"].update(kv_cache_scheme=scheme))

    bad = changed(lie, "llama", "fp8", kv_cache="fp8")
    assert found(bad, "1.3.0rc20") == {"TC-339": "warning"} and found(bad, NEW) == {}


def test_mixed_precision_and_its_second_file(changed: Callable[..., Path]) -> None:
    """quant_cfg.json: wanted by old releases, and never in contradiction."""
    options = {"attention": "fp8"}
    plain = changed(lambda directory: None, "qwen2_moe", "nvfp4")
    del options
    assert found(plain, "1.0.0") == {"TC-339": "error"} and found(plain, "1.2.1") == {"TC-339": "warning"}
    assert found(plain, NEW) == {}
    legacy = json.loads((plain / "hf_quant_config.json").read_text())["quantization"]
    (plain / "quant_cfg.json").write_text(json.dumps(legacy))
    assert found(plain, "1.0.0") == {}
    name = next(iter(legacy["quantized_layers"]))
    say(plain, "quant_cfg.json", lambda v: v["quantized_layers"][name].update(quant_algo="W8A16"))
    assert found(plain, NEW) == {"TC-323": "error"}
    (plain / "quant_cfg.json").write_text(json.dumps({**legacy, "kv_cache_quant_algo": "INT8"}))
    say(plain, "hf_quant_config.json", lambda v: v["quantization"].update(kv_cache_quant_algo="FP8"))
    assert "TC-323" in found(plain, NEW)


@pytest.mark.parametrize(
    ("kind", "projection"), [("llama", "o_proj"), ("qwen3_moe", "o_proj"), ("llama", "down_proj")]
)
def test_awq_without_a_channel_scale_where_it_is_read_by_name(
    changed: Callable[..., Path], kind: str, projection: str
) -> None:
    block = "self_attn" if projection == "o_proj" else "mlp"
    name = f"model.layers.0.{block}.{projection}.pre_quant_scale"
    bad = changed(
        lambda directory: tensors_of(directory, lambda tensors: tensors.pop(name)),
        kind,
        "int4_awq",
        policy="all-linear",
    )
    assert found(bad)["TC-346"] == "error"
    bare = audit(bad).findings
    assert not any(item.severity == "error" for item in bare)


def test_experts_in_w4a8_awq_without_one_or_in_another_dtype(changed: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.pre_quant_scale"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]
        other = name.replace("up_proj", "down_proj")
        tensors[other] = tensors[other].float()

    bad = changed(lambda directory: tensors_of(directory, drop), "qwen3_moe", "w4a8_awq")
    assert found(bad) == {"TC-346": "error", "TC-311": "error"}


def test_experts_in_a_format_without_a_kernel(sound: Callable[..., Path]) -> None:
    assert found(sound("qwen3_moe", "int4_awq")) == {"TC-345": "error"}
    assert found(sound("mixtral", "int8_sq"), "1.2.1") == {"TC-345": "error"}


@pytest.mark.parametrize(
    ("kind", "format_name", "ranks", "is_bad"),
    [
        ("qwen3_moe", "nvfp4", {"tp": 8}, False),
        ("qwen3_moe", "nvfp4", {"tp": 16}, True),
        ("qwen3_moe", "nvfp4", {"tp": 4, "ep": 4}, False),
        ("qwen3_moe", "fp8_block", {"tp": 2}, True),
        ("qwen3_moe", "fp8", {"tp": 2}, False),
        ("mixtral", "fp8_block", {"tp": 2, "ep": 2}, False),
        ("llama", "int4_awq", {"tp": 2}, True),
        ("llama", "fp8", {"tp": 3}, True),
    ],
)
def test_ranks_that_cut_a_block(
    sound: Callable[..., Path], kind: str, format_name: str, ranks: dict[str, int], is_bad: bool
) -> None:
    """128 inputs of down_proj: NVFP4 needs 16 each, blocks of 128 none left over."""
    options = {"policy": "experts-only"} if kind != "llama" else {}
    got = found(sound(kind, format_name, **options), **ranks)
    assert got == ({"TC-347": "error"} if is_bad else {})


@pytest.mark.parametrize("ranks", [{"tp": 0}, {"tp": 4, "ep": 3}, {"ep": 2}])
def test_ranks_that_do_not_exist(ranks: dict[str, int]) -> None:
    with pytest.raises(UsageError) as caught:
        Runtime(version=NEW, **ranks)
    assert caught.value.code == "TC-105"


def test_a_release_number_that_is_none() -> None:
    with pytest.raises(UsageError) as caught:
        Runtime(version="newest")
    assert caught.value.code == "TC-106"


def test_the_command_line(toolchain: Callable[..., Any], changed: Callable[..., Path]) -> None:
    bad = changed(only_flat, "llama", "fp8")
    assert toolchain("verify", bad).status == 0
    assert toolchain("verify", bad, "--target", "trtllm").status == 1
    ran = toolchain("verify", bad, "--trtllm-version", "1.2.1", "--json")
    assert ran.status == 1 and {item["code"] for item in ran.json["findings"]} >= {"TC-339"}
    assert toolchain("verify", bad, "--target", "trtllm", "--trtllm-version", NEW, "--tp", 2).status == 0
    assert toolchain("verify", bad, "--tp", 2).status == 2
    assert toolchain("verify", bad, "--target", "local", "--trtllm-version", NEW).status == 2
    assert toolchain("verify", bad, "--manifest", "--target", "trtllm").status == 2


def codes(findings: tuple[Finding, ...]) -> set[str]:
    return {item.code for item in findings}


def test_one_expert_with_an_outlier(changed: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.experts.2.down_proj.input_scale"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name] * 1000

    bad = changed(lambda directory: tensors_of(directory, spoil), "qwen3_moe", "nvfp4")
    verdict = audit(bad)
    assert verdict.passed and codes(verdict.findings) == {"TC-337"} and verdict.findings[0].where == name
