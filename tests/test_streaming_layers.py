"""Quantization with data, streamed layer by layer: the same files as in memory, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import streamed
from tests.planning import plan_for, with_calibration
from tests.streamed import files, hidden
from tests.tiny import make_fp8_source, make_llama4_wrapper, make_mxfp4_source, make_tiny
from toolchain.checkpoint.audit import audit
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.plan.policy import PolicyOptions
from toolchain.plan.types import Plan
from toolchain.quantize.job import quantize
from toolchain.quantize.streaming.calibrated import quantize_layers

Tiny = Callable[[str], Path]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed.small_shards(monkeypatch)


def stream(plan: Plan, output: Path, **options: Any) -> dict[str, Any]:
    return quantize_layers(plan, output, device="cpu", **options)


def same_as_in_memory(plan: Plan, where: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifests of both ways, once their files are found equal."""
    made = quantize(plan, where / "memory", device="cpu", stream=False)
    manifest = stream(plan, where / "stream")
    expected, got = files(where / "memory"), files(where / "stream")
    assert sorted(got) == sorted(expected)
    assert [name for name in expected if got[name] != expected[name]] == []
    assert manifest["streamed"] == "layers" and hidden(where) == []
    same = [
        key
        for key in made
        if key not in ("seconds", "peak_memory_bytes", "files") and made[key] != manifest.get(key)
    ]
    assert same == [], "the manifests say the same"
    return made, manifest


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen3_moe", "nvfp4", {"kv_cache": "fp8"}),
    ("qwen3_moe", "nvfp4", {"policy": "all-linear", "recipe": "best", "kv_cache": "nvfp4"}),
    ("qwen3_moe", "nvfp4", {"recipe": "arrange+compensate+gptq"}),
    ("qwen3_moe", "fp8_block", {"recipe": "best"}),
    ("mixtral", "int4_awq", {}),
    ("mixtral", "w4a16_nvfp4", {"recipe": "best"}),
    ("mixtral", "int4_gptq", {}),
    ("deepseek_v3", "nvfp4", {"recipe": "headroom"}),
    ("deepseek_v3", "w4a8_awq", {"recipe": "best"}),
    ("glm4_moe", "fp8", {"recipe": "best", "kv_cache": "fp8"}),
    ("minimax", "w4a8_nvfp4_fp8", {}),
    ("gpt_oss", "nvfp4", {"recipe": "window"}),
    ("llama4_text", "fp8", {}),
    ("llama", "int8_sq", {"kv_cache": "fp8"}),
    ("llama", "int4_awq", {"recipe": "max"}),
]


@pytest.mark.parametrize(("kind", "format", "options"), CASES)
def test_the_same_files_as_in_memory(
    kind: str, format: str, options: dict[str, Any], tiny: Tiny, tmp_path: Path, small_shards: None
) -> None:
    same_as_in_memory(plan_for(tiny(kind), format, **options), tmp_path)
    assert len(list((tmp_path / "stream").glob("*.safetensors"))) > 3
    assert audit(tmp_path / "stream", against=tiny(kind)).passed


def test_the_output_projection_is_behind_the_last_layer(tiny: Tiny, tmp_path: Path) -> None:
    options = PolicyOptions(lm_head="same")
    plan = plan_for(tiny("llama"), "nvfp4", policy="all-linear", policy_options=options)
    same_as_in_memory(plan, tmp_path)
    index = json.loads((tmp_path / "stream" / "hf_quant_config.json").read_text())
    assert "lm_head" not in index["quantization"]["exclude_modules"]


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "balanced", "samples": 3},
        {"min_tokens_per_expert": 60, "max_samples": 12, "samples": 2},
        {"mode": "topk", "topk_ratio": 0.75},
        {"mode": "all", "batch_size": 3},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_samples_and_experts_are_chosen_as_in_memory(
    changes: dict[str, Any], tiny: Tiny, tmp_path: Path, small_shards: None
) -> None:
    plan = with_calibration(plan_for(tiny("qwen3_moe"), "nvfp4"), **changes)
    made, manifest = same_as_in_memory(plan, tmp_path)
    assert manifest["calibration"] == made["calibration"] and (tmp_path / "stream/coverage.json").is_file()


@pytest.mark.parametrize("format", ["nvfp4", "fp8_block"])
def test_an_fp8_source(format: str, tiny: Tiny, tmp_path: Path, small_shards: None) -> None:
    source = make_fp8_source(tiny("deepseek_v3"), tmp_path / "source")
    same_as_in_memory(plan_for(source, format), tmp_path)


def test_an_mxfp4_source(tiny: Tiny, tmp_path: Path, small_shards: None) -> None:
    source = make_mxfp4_source(tiny("gpt_oss"), tmp_path / "source")
    made, _ = same_as_in_memory(plan_for(source, "nvfp4"), tmp_path)
    assert made["source_numbers"]["cast"]


def test_a_wrapper_with_a_tower(tmp_path: Path) -> None:
    source = make_llama4_wrapper(tmp_path / "source")
    same_as_in_memory(plan_for(source, "fp8"), tmp_path)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"torch_dtype": "float32"}])
def test_other_models(changes: dict[str, Any], tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "source", **changes)
    same_as_in_memory(plan_for(source, "nvfp4", policy="all-linear", recipe="best"), tmp_path)


class Killed(BaseException):
    """What a signal would do, at an instant of the test's choosing."""


def stop_after(monkeypatch: pytest.MonkeyPatch, writes: int, error: BaseException) -> None:
    """Writing fails at write number ``writes``."""
    real, count = os.pwrite, iter(range(10**9))

    def failing(descriptor: int, data: Any, position: int) -> int:
        if next(count) == writes:
            raise error
        return real(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", failing)


def begun(plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended in its second layer; returns what it left behind."""
    from toolchain.quantize.streaming.layer_shards import LayerShards

    real = LayerShards.write

    def failing(self: LayerShards, step: int, exporter: Any) -> Any:
        if step == 1:
            with monkeypatch.context() as patch:
                stop_after(patch, 5, Killed())
                return real(self, step, exporter)
        return real(self, step, exporter)

    with monkeypatch.context() as patch:
        patch.setattr(LayerShards, "write", failing)
        with pytest.raises(Killed):
            stream(plan, output)
    assert not output.exists()
    left = output.with_name(f".{output.name}.streaming")
    assert [path.name for path in left.glob("layers/quantize-*.json")] == ["quantize-0.json"]
    return left


def layers_done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the layers that are worked on from now on."""
    from toolchain.modeling.layered import LayeredModel

    real, found = LayeredModel.layer, list[int]()

    def noting(self: LayeredModel, index: int) -> Any:
        found.append(index)
        return real(self, index)

    monkeypatch.setattr(LayeredModel, "layer", noting)
    return found


@pytest.mark.parametrize("recipe", ["default", "best"])
def test_a_run_that_ended_goes_on(
    recipe: str, tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny("qwen3_moe"), "nvfp4", recipe=recipe)
    stream(plan, tmp_path / "whole")
    begun(plan, tmp_path / "out", monkeypatch)
    done = layers_done(monkeypatch)
    stream(plan, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole") and hidden(tmp_path) == []
    assert done == [1], "the first layer is not made again"


def test_a_run_that_ended_is_dropped_when_the_output_is_made_in_memory(
    tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny("qwen3_moe"), "nvfp4")
    begun(plan, tmp_path / "out", monkeypatch)
    quantize(plan, tmp_path / "out", device="cpu", stream=False)
    assert hidden(tmp_path) == []


def test_a_full_disk_leaves_what_is_finished(
    tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny("qwen3_moe"), "nvfp4")
    stream(plan, tmp_path / "whole")
    left = tmp_path / ".out.streaming"
    real = os.pwrite

    def full(descriptor: int, data: Any, position: int) -> int:
        if (left / "layers" / "quantize-0.json").is_file():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ToolchainError, match=r"layer 1 .*No space left on device") as failed:
            stream(plan, tmp_path / "out")
    assert failed.value.code == "TC-005" and "run the same command again" in failed.value.hint
    assert (left / "layers" / "quantize-0.json").is_file() and not (tmp_path / "out").exists()
    stream(plan, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_changed_setting_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny("qwen3_moe"), "nvfp4")
    begun(plan, tmp_path / "out", monkeypatch)
    for other, name in (
        (plan_for(tiny("qwen3_moe"), "nvfp4", recipe="best"), "recipe: 'max' -> "),
        (plan_for(tiny("qwen3_moe"), "nvfp4", kv_cache="fp8"), "kv_cache: 'none' -> 'fp8'"),
        (with_calibration(plan, samples=5), "calibration tokens"),
        (with_calibration(plan, batch_size=2), "calibration"),
    ):
        with pytest.raises(UsageError, match=name) as refused:
            stream(other, tmp_path / "out")
        assert refused.value.code == "TC-231"
    stream(plan, tmp_path / "out")
    assert audit(tmp_path / "out").passed


@pytest.mark.parametrize("what", ["shard", "hidden"])
def test_what_was_left_is_trusted_only_by_its_hash(
    what: str, tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny("qwen3_moe"), "nvfp4")
    left = begun(plan, tmp_path / "out", monkeypatch)
    if what == "hidden":
        victim, place = left / "layers" / "quantize-observed-1", 11
    else:
        record = json.loads((left / "layers" / "quantize-0.json").read_text())
        victim, place = left / "content" / f".{next(iter(record['digests']))}.partial", -1
    data = bytearray(victim.read_bytes())
    data[place] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ToolchainError, match="not what was written there") as refused:
        stream(plan, tmp_path / "out")
    assert refused.value.code == "TC-233" and f"remove {left}" in refused.value.hint
    shutil.rmtree(left)
    stream(plan, tmp_path / "out")
    stream(plan, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_failure_names_the_layer_and_keeps_the_rest(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.quantize.accuracy import layers as walk

    plan = plan_for(tiny("qwen3_moe"), "nvfp4")
    real = walk.call_layer

    def failing(layer: Any, hidden: torch.Tensor, *, arguments: Any, index: int) -> torch.Tensor:
        if index == 1:
            raise RuntimeError("CUDA out of memory")
        return real(layer, hidden, arguments=arguments, index=index)

    with monkeypatch.context() as patch:
        patch.setattr("toolchain.quantize.streaming.layer_step.call_layer", failing)
        expected = r"layer 1 \(model\.layers\.1\): RuntimeError: CUDA out of memory"
        with pytest.raises(ToolchainError, match=expected) as failed:
            stream(plan, tmp_path / "out")
    assert failed.value.code == "TC-234"
    stream(plan, tmp_path / "out")
    stream(plan, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_weights_that_are_missing(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    plan = plan_for(source, "nvfp4", policy="all-linear")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ToolchainError, match=r"layer 1 .*1 weights missing.*up_proj"):
        stream(plan, tmp_path / "out")


@pytest.mark.parametrize("recipe", ["default", pytest.param("best", marks=pytest.mark.slow)])
def test_killed_at_any_instant(recipe: str, tiny: Tiny, tmp_path: Path, small_shards: None) -> None:
    plan = with_calibration(
        plan_for(tiny("qwen3_moe"), "nvfp4", recipe=recipe, kv_cache="fp8"), sampling="balanced", samples=2
    )
    streamed.require_same_after_kills(quantize_layers, plan, tmp_path)


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from toolchain.core.files import read_json
from toolchain.plan.types import Plan
from toolchain.quantize.streaming.calibrated import quantize_layers
from toolchain.core.environment import peak_memory_bytes
import modelopt.torch.quantization, modelopt.torch.export, torch, transformers
torch.set_num_threads(1)
plan = Plan.from_json(read_json(Path({plan!r})))
quantize_layers(Plan.from_json(read_json(Path({small!r}))), Path({out!r} + "-small"), device="cpu")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = peak_memory_bytes()
resource.setrlimit(resource.RLIMIT_AS, (used + {allowed}, used + {allowed}))
quantize_layers(plan, Path({out!r}), device="cpu")
print(peak_memory_bytes() - before)
"""


def test_a_model_far_larger_than_the_memory_that_is_allowed(tiny: Tiny, tmp_path: Path) -> None:
    """640 MB of weights in eight layers, within two layers and 200 MB beyond what the libraries take."""
    shape = dict(hidden_size=512, moe_intermediate_size=512, num_experts=48, num_hidden_layers=8)
    source = make_tiny("qwen3_moe", tmp_path / "source", **shape)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size > 600_000_000
    (tmp_path / "plan.json").write_text(json.dumps(plan_for(source, "nvfp4").to_json()))
    (tmp_path / "small.json").write_text(json.dumps(plan_for(tiny("qwen3_moe"), "nvfp4").to_json()))
    script = LIMITED.format(
        root=str(Path(__file__).resolve().parent.parent),
        plan=str(tmp_path / "plan.json"),
        small=str(tmp_path / "small.json"),
        out=str(tmp_path / "out"),
        allowed=450_000_000,
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert int(ran.stdout) < 2 * size / 8 + 200_000_000
    assert audit(tmp_path / "out").passed
